"""Padded or packed batches of rows. Their order depends on the seed, never on the ranks."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from agcl.tasks import Encoded

IGNORED = -100
"""Label of tokens excluded from losses and scores: prompt and padding."""
_LINE_TOKENS = 256
"""Approximate length of a packed line: short enough that attention over the whole line is cheap
compared with the linear layers."""


@dataclass(frozen=True)
class Batch:
    """Right-padded rows. Causal attention never sees the padding, so there is no mask.

    In a packed batch a line holds several consecutive rows; otherwise a line is a row.
    """

    input_ids: Tensor
    """(lines, tokens)"""
    labels: Tensor
    """(lines, tokens): token id on answer tokens, those of a conversation's earlier assistant turns
    too, `IGNORED` elsewhere; not shifted."""
    lengths: Tensor
    """(lines,): number of tokens before the padding."""
    position_ids: Tensor | None = None
    """(lines, tokens): each token's position in its row. From these transformers infers where the
    rows of a packed line start, and keeps tokens from attending to other rows."""

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device."""
        position_ids = None if self.position_ids is None else self.position_ids.to(device)
        return Batch(
            self.input_ids.to(device), self.labels.to(device), self.lengths.to(device), position_ids
        )


def collate(rows: Sequence[Encoded]) -> Batch:
    """Pad rows to the longest row."""
    return replace(_pad([[row] for row in rows]), position_ids=None)


def pack(rows: Sequence[Encoded]) -> Batch:
    """Concatenate rows into lines of similar length, with almost no padding.

    A line has about `_LINE_TOKENS` tokens, or as many as the longest row. Row order changes.
    """
    return _pad([[rows[i] for i in line] for line in _lines([len(r.input_ids) for r in rows])])


def _lines(lengths: Sequence[int]) -> list[list[int]]:
    """Row indices of the fewest lines that are found to hold rows of these lengths."""
    size = max(_LINE_TOKENS, *lengths)
    for count in range(math.ceil(sum(lengths) / size), len(lengths) + 1):
        lines: list[list[int]] = [[] for _ in range(count)]
        filled = [0] * count
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            line = filled.index(min(filled))
            lines[line].append(i)
            filled[line] += lengths[i]
        if max(filled) <= size:
            break
    return lines


def _pad(lines: Sequence[Sequence[Encoded]]) -> Batch:
    """Pad lines of rows to the longest line."""
    lengths = [sum(len(row.input_ids) for row in line) for line in lines]
    input_ids = torch.zeros(len(lines), max(lengths), dtype=torch.long)
    labels, position_ids = torch.full_like(input_ids, IGNORED), torch.zeros_like(input_ids)
    for i, line in enumerate(lines):
        start = 0
        for row in line:
            end = start + len(row.input_ids)
            input_ids[i, start:end] = torch.tensor(row.input_ids)
            for first, stop in row.spans:
                learned = slice(start + first, start + stop)
                labels[i, learned] = input_ids[i, learned]
            position_ids[i, start:end] = torch.arange(len(row.input_ids))
            start = end
    return Batch(input_ids, labels, torch.tensor(lengths), position_ids)


def answer_places(batch: Batch) -> Tensor:
    """Mask of the positions whose logits predict an answer token, (lines, tokens - 1) bool."""
    return batch.labels[:, 1:] != IGNORED


def answer_tokens(batch: Batch) -> Tensor:
    """The answer tokens, line by line, (answer tokens,)."""
    return batch.labels[:, 1:][answer_places(batch)]


def micro_batches(
    lengths: Sequence[int],
    *,
    max_rows: int | None = None,
    max_tokens: int | None = None,
    packing: bool = False,
) -> list[list[int]]:
    """Row indices of a batch's forward passes; rows of similar length share one.

    A pass has at most `max_rows` rows and `max_tokens` tokens, padding included; a row longer than
    `max_tokens` gets a separate pass. Passes do not depend on the number of ranks: different passes
    round differently, and a config must give the same numbers on every machine.
    """
    passes: list[list[int]] = []
    tokens = 0
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        # Sorted, so that the pass would be padded to this row.
        tokens = (
            tokens + lengths[i] if packing else lengths[i] * (len(passes[-1]) + 1 if passes else 1)
        )
        if not passes or len(passes[-1]) == max_rows or (max_tokens and tokens > max_tokens):
            passes.append([])
            tokens = lengths[i]
        passes[-1].append(i)
    if packing and max_tokens:  # Lines of a few long rows leave room that no row fills.
        passes = [part for each in passes for part in _within(max_tokens, each, lengths)]
    return passes


def _within(max_tokens: int, rows: list[int], lengths: Sequence[int]) -> list[list[int]]:
    """The rows, halved until a part's lines have at most `max_tokens` tokens or it is one row."""
    lines = _lines([lengths[i] for i in rows])
    longest = max(sum(lengths[rows[i]] for i in line) for line in lines)
    if len(rows) == 1 or len(lines) * longest <= max_tokens:
        return [rows]
    middle = (len(rows) + 1) // 2
    return [
        part
        for half in (rows[:middle], rows[middle:])
        for part in _within(max_tokens, half, lengths)
    ]


def in_order(num_rows: int, batch_size: int) -> list[list[int]]:
    """Row indices of consecutive batches."""
    return [
        list(range(start, min(start + batch_size, num_rows)))
        for start in range(0, num_rows, batch_size)
    ]


def by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Row indices of batches with rows of similar length, to keep padding small."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    return [[order[place] for place in batch] for batch in in_order(len(lengths), batch_size)]


def shuffled(num_rows: int, batch_size: int, *, seed: int, epoch: int) -> Iterator[list[int]]:
    """Row indices of one epoch's global batches, in seeded order; the last may be smaller."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(num_rows, generator=generator).tolist()
    for batch in in_order(num_rows, batch_size):
        yield [order[i] for i in batch]
