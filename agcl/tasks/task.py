"""What a task is: a name and streams of prompt-answer rows."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from agcl.errors import InputError

TRAIN, TEST = "train", "test"

_LONGEST_NAME = 100


@dataclass(frozen=True, slots=True)
class Row:
    """One example; the answer starts with the space that separates it from the prompt."""

    prompt: str
    answer: str


RowSource = Callable[[], Iterator[Row]]
"""Starts one pass over a split's rows. Picklable, deterministic, and never whole in memory."""


@dataclass(frozen=True)
class Task:
    """A name, row streams by split, and which split every evaluation set scores."""

    name: str
    splits: Mapping[str, RowSource]
    """Row streams by split; `train` is always there."""
    scored: Mapping[str, str] = field(default_factory=lambda: {TEST: TEST})
    """Evaluation set -> split that it scores; the first one is the main one."""


def check_names(names: list[str]) -> None:
    """Raise `InputError` for task names that repeat or that cannot be a folder's name."""
    for index, name in enumerate(names):
        separated = any(c in "/\\" or not c.isprintable() for c in name)
        if name in ("", ".", "..") or separated or len(name.encode()) > _LONGEST_NAME:
            raise InputError(f"task {index + 1}: name {name!r} cannot be used as a folder name")
        if name in names[:index]:
            raise InputError(f"task {index + 1}: name {name!r} is already used by another task")


def check_rows(task: Task, split: str) -> int:
    """Read one split once and return its number of rows.

    Raises `InputError` naming the task, split and row for a row without a prompt or an answer,
    and for a split without rows.
    """
    count = 0
    for count, row in enumerate(task.splits[split](), start=1):
        for what, text in (("prompt", row.prompt), ("answer", row.answer)):
            if not text.strip():
                raise InputError(f"task {task.name}, {split} row {count}: the {what} is empty")
    if count == 0:
        raise InputError(f"task {task.name}: the {split} split has no rows")
    return count
