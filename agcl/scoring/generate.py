"""Batched decoding: greedy, for scorers that need text; sampled, for text that a model makes up."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel

from agcl.model.forward import Precision, autocast
from agcl.parallel import distributed, sharding
from agcl.tasks.batches import by_length

_GREEDY = {"do_sample": False, "num_beams": 1}
_SAMPLED = {"do_sample": True, "temperature": 1.0, "top_p": 0.98, "top_k": 0}
"""The model's own distribution without the tail in which text falls apart."""


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    end: int | Sequence[int],
    max_new_tokens: int,
    batch_size: int,
    precision: Precision = "float32",
    seed: int | None = None,
) -> list[list[int]]:
    """Continuation of every prompt, up to an `end` token (excluded) or `max_new_tokens`.

    A continuation also stops at the model's last position. A batch with less room than
    `max_new_tokens` is decoded one prompt at a time.

    Greedy, or with a `seed` sampled at temperature 1 from the most likely tokens that hold 0.98 of
    the probability. Prompts of similar length share a left-padded batch; batches, and the seed of
    each, do not depend on the number of ranks. The model's own generation config (sampling,
    penalties) is ignored. Without an end (an empty sequence) every continuation has the maximum
    length. Collective: same result on every rank.
    """
    ends = [end] if isinstance(end, int) else list(end)
    pad = ends[0] if ends else 0
    was_training, configured = model.training, model.generation_config
    model.eval()
    # Replace the model's config: `generate` would take every unset option from it.
    settings: dict[str, Any] = _GREEDY if seed is None else _SAMPLED
    model.generation_config = GenerationConfig(
        **settings,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=pad,
        use_cache=True,
    )
    # Summed over ranks at the end: each rank leaves the others' rows at zero.
    generated = torch.zeros(len(prompts), max_new_tokens, dtype=torch.int32, device=model.device)
    lengths = [len(prompt) for prompt in prompts]
    room = [max(1, min(max_new_tokens, _positions(model) - length)) for length in lengths]
    batches: list[list[int]] = []
    for batch in by_length(lengths, batch_size):
        fits = min(room[i] for i in batch) == max_new_tokens
        batches += [batch] if fits else [[i] for i in batch]
    try:
        for number, counts in distributed.in_turn(len(batches)):
            indices = batches[number]
            with torch.random.fork_rng(enabled=seed is not None):
                if seed is not None:
                    torch.manual_seed(seed * 1_000_003 + number)
                most = min(room[i] for i in indices)
                new = _continue(model, [prompts[i] for i in indices], most, pad, precision)
            if counts:
                generated[indices] = pad
                generated[indices, : new.shape[1]] = new.to(torch.int32)
    finally:
        model.generation_config = configured
        model.train(was_training)
    distributed.sum_in_place([generated])
    return [_until(ids, ends) for ids in generated.tolist()]


def _until(ids: list[int], ends: Sequence[int]) -> list[int]:
    return ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))]


def _positions(model: PreTrainedModel) -> int:
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return 2**31 if found is None else int(found)


@contextmanager
def _within_positions(model: PreTrainedModel) -> Iterator[None]:
    """Look up the last row of a table of learned positions for those beyond it, if sharded.

    A rank that has finished keeps running passes while others decode, at later positions each
    time; what these return is not used.
    """

    def clamp(module: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (args[0].clamp(max=_positions(model) - 1),)

    tables = [each for name, each in model.named_modules() if name.endswith("wpe")]
    with ExitStack() as hooks:
        for table in tables if sharding.is_sharded(model) else ():
            hooks.enter_context(table.register_forward_pre_hook(clamp))
        yield


def _continue(
    model: PreTrainedModel, prompts: list[Sequence[int]], most: int, pad: int, precision: Precision
) -> torch.Tensor:
    """New tokens of a batch, (prompts, at most `most`)."""
    ids = [torch.tensor(prompt, dtype=torch.long) for prompt in prompts]
    padded = pad_sequence(ids, batch_first=True, padding_value=pad, padding_side="left")
    mask = pad_sequence([*map(torch.ones_like, ids)], batch_first=True, padding_side="left")
    with (
        _within_positions(model),
        autocast(model.device, precision, cache=True),  # A pass per token.
    ):
        out = model.generate(
            input_ids=padded.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=most,
            # Ranks of a sharded model keep running forward passes until all have finished.
            synced_gpus=sharding.is_sharded(model),
        )
    return cast(torch.Tensor, out)[:, padded.shape[1] :]
