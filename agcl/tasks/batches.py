"""Rows to padded or packed batches, in an order of the seed and never of the workers."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from agcl.tasks import Encoded

IGNORED = -100
"""Label of tokens that no loss or score counts: the prompt and the padding."""
_LINE = 256
"""Tokens of a packed line, about: few enough that attention, which looks at the whole line, costs
little beside the linear layers."""


@dataclass(frozen=True)
class Batch:
    """Right-padded rows. Causal attention never looks at padding, so there is no mask.

    In a packed batch a line holds several rows, one after the other.
    """

    input_ids: Tensor
    """(lines, tokens); a line is a row, if the batch is not packed"""
    labels: Tensor
    """(lines, tokens): the id on answer tokens, `IGNORED` elsewhere; not shifted."""
    lengths: Tensor
    """(lines,): tokens before the padding."""
    position_ids: Tensor | None = None
    """(lines, tokens): each token's place in its row. transformers reads from them where a row of
    a packed line begins, and lets no token attend to another row."""

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device."""
        position_ids = None if self.position_ids is None else self.position_ids.to(device)
        return Batch(
            self.input_ids.to(device), self.labels.to(device), self.lengths.to(device), position_ids
        )


def collate(rows: Sequence[Encoded]) -> Batch:
    """Pad rows to the longest one."""
    return replace(_of_lines([[row] for row in rows]), position_ids=None)


def pack(rows: Sequence[Encoded]) -> Batch:
    """Put rows behind each other in lines of like length, so that next to nothing is padding.

    A line has about `_LINE` tokens, or as many as the longest row. The rows are those of `collate`
    in another order.
    """
    ordered = sorted(rows, key=lambda row: len(row.input_ids), reverse=True)
    size = max(_LINE, len(ordered[0].input_ids))
    lines: list[list[Encoded]] = [[] for _ in range(math.ceil(_num_tokens(ordered) / size))]
    for row in ordered:
        min(lines, key=_num_tokens).append(row)
    return _of_lines(lines)


def _of_lines(lines: Sequence[Sequence[Encoded]]) -> Batch:
    """Pad lines of rows to the longest line."""
    lengths = [_num_tokens(line) for line in lines]
    input_ids = torch.zeros(len(lines), max(lengths), dtype=torch.long)
    labels, position_ids = torch.full_like(input_ids, IGNORED), torch.zeros_like(input_ids)
    for i, line in enumerate(lines):
        start = 0
        for ids, prompt_tokens in line:
            end = start + len(ids)
            # Nothing of its own row predicts a row's first token.
            answer = start + max(1, prompt_tokens)
            input_ids[i, start:end] = torch.tensor(ids)
            labels[i, answer:end] = input_ids[i, answer:end]
            position_ids[i, start:end] = torch.arange(len(ids))
            start = end
    return Batch(input_ids, labels, torch.tensor(lengths), position_ids)


def _num_tokens(rows: Sequence[Encoded]) -> int:
    return sum(len(row.input_ids) for row in rows)


def targets(batch: Batch) -> Tensor:
    """Labels aligned with the logits that predict them, shape (rows, tokens - 1)."""
    return batch.labels[:, 1:]


def answer_places(batch: Batch) -> Tensor:
    """Positions whose logits predict an answer's token, (rows, tokens - 1) bool."""
    return targets(batch) != IGNORED


def answer_tokens(batch: Batch) -> Tensor:
    """The answers' tokens, row after row, (answer tokens,)."""
    return targets(batch)[answer_places(batch)]


def in_order(num_rows: int, batch_size: int) -> list[list[int]]:
    """Row indices of consecutive batches."""
    return [
        list(range(start, min(start + batch_size, num_rows)))
        for start in range(0, num_rows, batch_size)
    ]


def by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Row indices of batches of rows of like length, so that little of a batch is padding."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    return [[order[place] for place in batch] for batch in in_order(len(lengths), batch_size)]


def shuffled(num_rows: int, batch_size: int, *, seed: int, epoch: int) -> Iterator[list[int]]:
    """Row indices of one epoch's global batches in a seeded order; the last may be smaller."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(num_rows, generator=generator).tolist()
    for batch in in_order(num_rows, batch_size):
        yield [order[i] for i in batch]
