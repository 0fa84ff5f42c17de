"""Selection of a task's rows by a seeded hash of each row's fact.

The hash does not depend on other rows, so adding rows moves no row between training and validation.
A question and its paraphrase have the same hash, so what one trains the other does not test.
"""

import hashlib
import heapq
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import count

from agcl.tasks.task import TEST, TRAIN, VALIDATION, Row, RowSource, Task


def position(row: Row, *, seed: int) -> float:
    """A number in [0, 1), determined by the row's fact and the seed."""
    fact = row.fact or f"{row.prompt}\0{row.answer}"
    digest = hashlib.sha256(f"{seed}\0{fact}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def tests_training_rows(task: Task) -> bool:
    """Whether at least half of the test rows are training rows. Reads both splits once.

    If so, training rows must not be held out for validation: the model would never learn facts that
    the scored rows ask for.
    """
    tested = {position(row, seed=0) for row in task.splits[TEST]()}
    trained = {p for row in task.splits[TRAIN]() if (p := position(row, seed=0)) in tested}
    return len(trained) * 2 >= len(tested)


def select(
    task: Task, *, train_rows: int | None, test_rows: int | None, validation: float, seed: int
) -> Task:
    """Limit the number of rows per split, and add validation rows if `validation` > 0.

    Validation rows are the task's own `validation` split; without one, the fraction `validation` of
    its training rows, which are then excluded from training.
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
            splits[split] = partial(_limited, source, limit, seed)
    return replace(task, splits=splits, scored=scored)


def _part(source: RowSource, share: float, seed: int, below: bool) -> Iterator[Row]:
    for row in source():
        if (position(row, seed=seed) < share) == below:
            yield row


def _limited(source: RowSource, limit: int, seed: int) -> Iterator[Row]:
    """The `limit` rows with the lowest positions, in source order. Reads the source twice."""
    # A different seed than in `_part`, whose rows all have low or all have high positions.
    positions = (position(row, seed=seed + 1) for row in source())
    lowest = {index for _, index in heapq.nsmallest(limit, zip(positions, count(), strict=False))}
    for index, row in enumerate(source()):
        if index in lowest:
            yield row
