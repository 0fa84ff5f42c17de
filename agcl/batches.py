"""Rows to padded batches, in an order that depends on the seed and never on the workers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from agcl.tasks import Encoded

IGNORED = -100
"""Label of tokens that no loss or score counts: the prompt and the padding."""


@dataclass(frozen=True)
class Batch:
    """Right-padded rows. Causal attention never looks at padding, so there is no mask."""

    input_ids: Tensor
    """(rows, tokens)"""
    labels: Tensor
    """(rows, tokens): the id on answer tokens, `IGNORED` elsewhere; not shifted."""
    lengths: Tensor
    """(rows,): tokens before the padding."""

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device."""
        return Batch(self.input_ids.to(device), self.labels.to(device), self.lengths.to(device))


def collate(rows: Sequence[Encoded]) -> Batch:
    """Pad rows to the longest one."""
    width = max(len(row.input_ids) for row in rows)
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full((len(rows), width), IGNORED, dtype=torch.long)
    for i, (ids, prompt_tokens) in enumerate(rows):
        input_ids[i, : len(ids)] = torch.tensor(ids)
        labels[i, prompt_tokens : len(ids)] = input_ids[i, prompt_tokens : len(ids)]
    return Batch(input_ids, labels, torch.tensor([len(row.input_ids) for row in rows]))


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
