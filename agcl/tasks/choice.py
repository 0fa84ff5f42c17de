"""Which rows of a task are used for what, by a seeded hash of the row.

A row's place does not depend on the other rows, so choices stay when rows are added.
"""

import hashlib
import heapq
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import count

from agcl.tasks.task import TEST, TRAIN, VALIDATION, Row, RowSource, Task


def position(prompt: str, answer: str, *, seed: int) -> float:
    """A number in [0, 1) drawn by the row and the seed."""
    digest = hashlib.sha256(f"{seed}\0{prompt}\0{answer}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def select(
    task: Task, *, train_rows: int | None, test_rows: int | None, validation: float, seed: int
) -> Task:
    """The task cut to so many rows a split, with rows for validation where a share is wanted.

    Those are its own `validation` split or else that share of its training rows, which are then not
    trained on.
    """
    splits = dict(task.splits)
    scored = dict(task.scored)
    own = splits.pop(VALIDATION, None)
    if validation:
        train = splits[TRAIN]
        splits[VALIDATION] = own or partial(_part, train, validation, seed, True)
        if own is None:
            splits[TRAIN] = partial(_part, train, validation, seed, False)
        scored[VALIDATION] = VALIDATION
    limits = {TRAIN: train_rows, TEST: test_rows, VALIDATION: test_rows}
    for split, source in splits.items():
        if limit := limits[split]:
            splits[split] = partial(_cut, source, limit, seed)
    return replace(task, splits=splits, scored=scored)


def _part(source: RowSource, share: float, seed: int, below: bool) -> Iterator[Row]:
    for row in source():
        if (position(row.prompt, row.answer, seed=seed) < share) == below:
            yield row


def _cut(source: RowSource, limit: int, seed: int) -> Iterator[Row]:
    """The rows of lowest position, in their order; reads the source twice."""
    # Another seed than that of `_part`, whose rows all have low or all have high positions.
    positions = (position(row.prompt, row.answer, seed=seed + 1) for row in source())
    chosen = {index for _, index in heapq.nsmallest(limit, zip(positions, count(), strict=False))}
    for index, row in enumerate(source()):
        if index in chosen:
            yield row
