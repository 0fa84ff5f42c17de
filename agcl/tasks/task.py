"""What a task is: a name and streams of prompt-answer rows."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from agcl.errors import InputError

TRAIN, TEST, VALIDATION = "train", "test", "validation"

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
    scorer: str = "exact_match"
    """How predictions are scored, by the name in `agcl/scoring/scorers.py` or by import path."""
    memorized: bool = False
    """What is scored are the trained rows (or paraphrases), which nobody could answer untrained."""


def check_names(names: list[str]) -> None:
    """Raise `InputError` for task names that repeat or that cannot be a folder's name."""
    for index, name in enumerate(names):
        separated = any(c in "/\\" or not c.isprintable() for c in name)
        if name in ("", ".", "..") or separated or len(name.encode()) > _LONGEST_NAME:
            raise InputError(f"task {index + 1}: name {name!r} cannot be used as a folder name")
        if name in names[:index]:
            raise InputError(f"task {index + 1}: name {name!r} is already used by another task")


def is_empty(row: Row) -> bool:
    """Whether a row is left out because it asks or answers nothing."""
    return not row.prompt.strip() or not row.answer.strip()


def check_rows(task: Task, split: str) -> int:
    """Read one split once and return its number of rows, without those that are empty.

    Raises `InputError` for a row that cannot be read, and for a split without rows.
    """
    num_rows = sum(not is_empty(row) for row in task.splits[split]())
    if num_rows == 0:
        raise InputError(f"task {task.name}: the {split} split has no rows that ask and answer")
    return num_rows
