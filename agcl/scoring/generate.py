"""Batched greedy decoding, for scorers that need generated text."""

from collections.abc import Sequence
from typing import cast

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel

from agcl.model.forward import Precision, autocast
from agcl.parallel import distributed, sharding
from agcl.tasks.batches import by_length


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    end: int,
    max_new_tokens: int,
    batch_size: int,
    precision: Precision = "float32",
) -> list[list[int]]:
    """Greedy continuation of every prompt, up to `end` (excluded) or `max_new_tokens`.

    Prompts of similar length share a left-padded batch; batches do not depend on the number of
    ranks. The model's own generation config (sampling, penalties) is ignored. Collective: same
    result on every rank.
    """
    was_training, configured = model.training, model.generation_config
    model.eval()
    # Replace the model's config: `generate` would take every unset option from it.
    model.generation_config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=end,
        pad_token_id=end,
        use_cache=True,
    )
    # Summed over ranks at the end: each rank leaves the others' rows at zero.
    generated = torch.zeros(len(prompts), max_new_tokens, dtype=torch.int32, device=model.device)
    batches = by_length([len(prompt) for prompt in prompts], batch_size)
    try:
        for number, counts in distributed.in_turn(len(batches)):
            indices = batches[number]
            new = _continue(model, [prompts[i] for i in indices], end, precision)
            if counts:
                generated[indices] = end
                generated[indices, : new.shape[1]] = new.to(torch.int32)
    finally:
        model.generation_config = configured
        model.train(was_training)
    distributed.sum_in_place([generated])
    return [ids[: ids.index(end)] if end in ids else ids for ids in generated.tolist()]


def _continue(
    model: PreTrainedModel, prompts: list[Sequence[int]], end: int, precision: Precision
) -> torch.Tensor:
    """New tokens of a batch, (prompts, at most max_new_tokens)."""
    ids = [torch.tensor(prompt, dtype=torch.long) for prompt in prompts]
    padded = pad_sequence(ids, batch_first=True, padding_value=end, padding_side="left")
    mask = pad_sequence([*map(torch.ones_like, ids)], batch_first=True, padding_side="left")
    with autocast(model.device, precision):
        out = model.generate(
            input_ids=padded.to(model.device),
            attention_mask=mask.to(model.device),
            # Ranks of a sharded model keep running forward passes until all have finished.
            synced_gpus=sharding.is_sharded(model),
        )
    return cast(torch.Tensor, out)[:, padded.shape[1] :]
