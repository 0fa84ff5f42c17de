"""Greedy decoding in batches, for scorers that need the model's own text."""

from collections.abc import Sequence
from typing import cast

import torch
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
    """The greedy continuation of every prompt, without its `end` token, the same on every worker.

    Stops at `end` or after `max_new_tokens`. Prompts of like length share a batch, padded on the
    left; batches do not depend on the number of workers, who take them in turn. What the model's
    folder says about sampling or penalties does not count.
    """
    was_training, configured = model.training, model.generation_config
    model.eval()
    # In place of the model's own: what an argument leaves open would be taken from there.
    model.generation_config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=end,
        pad_token_id=end,
        use_cache=True,
    )
    # Shared by summing: rows of other workers stay zero.
    found = torch.zeros(len(prompts), max_new_tokens, dtype=torch.int32, device=model.device)
    batches = by_length([len(prompt) for prompt in prompts], batch_size)
    try:
        for number, counts in distributed.in_turn(len(batches)):
            indices = batches[number]
            new = _continue(model, [prompts[i] for i in indices], end, precision)
            if counts:
                found[indices] = end
                found[indices, : new.shape[1]] = new.to(torch.int32)
    finally:
        model.generation_config = configured
        model.train(was_training)
    distributed.sum_in_place([found])
    return [_until(end, ids) for ids in found.tolist()]


def _continue(
    model: PreTrainedModel, prompts: list[Sequence[int]], end: int, precision: Precision
) -> torch.Tensor:
    """New tokens of a batch, (prompts, at most max_new_tokens)."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), end, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    with autocast(model.device, precision):
        out = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            synced_gpus=sharding.is_sharded(model),  # Who is done goes on until all are.
        )
    return cast(torch.Tensor, out)[:, width:]


def _until(end: int, ids: list[int]) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids
