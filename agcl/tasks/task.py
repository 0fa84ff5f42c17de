"""A task: a name and streams of prompt-answer rows."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from agcl.errors import InputError

TRAIN, TEST, VALIDATION = "train", "test", "validation"

_MAX_NAME_BYTES = 100


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages of a chat, to be rendered by the tokenizer's chat template."""

    messages: tuple[Mapping[str, Any], ...]
    """`role` and `content`, perhaps `tool_calls`; the last one is the assistant's, and scored."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """JSON schemas of the functions that the assistant may call."""
    context: int = 0
    """Number of messages at the start whose assistant turns carry no loss."""
    place: str = field(default="", compare=False)
    """File and row, for error messages."""
    unlearned: frozenset[int] = frozenset()
    """Indices of further assistant messages without loss."""


@dataclass(frozen=True, slots=True)
class Row:
    """One example; the answer starts with the space that separates it from the prompt.

    With a `conversation`, its messages are encoded, and both texts serve only hashes and checks.
    """

    prompt: str
    answer: str
    fact: str = field(default="", compare=False)
    """The fact that the row asks for, shared with its paraphrases, so that a random share of rows
    has all or none of them. If empty, prompt and answer identify the fact."""
    conversation: Conversation | None = field(default=None, hash=False)
    references: tuple[str, ...] = ()
    """More correct answers, not used in training. All scorers but `exact_match` take the best."""
    kept: int = 0
    """Characters at the start of the prompt, such as an instruction, that `truncate` leaves."""


RowSource = Callable[[], Iterator[Row]]
"""Starts one pass over a split's rows. Picklable and deterministic; streams rows from disk."""


@dataclass(frozen=True)
class Task:
    """A name, row streams by split, and the split that each evaluation set scores."""

    name: str
    splits: Mapping[str, RowSource]
    """Row streams by split; always includes `train`."""
    scored: Mapping[str, str] = field(default_factory=lambda: {TEST: TEST})
    """Evaluation set -> split that it scores; the first is the main one."""
    scorer: str = "exact_match"
    """A name in `agcl/scoring/scorers.py`, or an import path."""
    memorized: bool = False
    """Scored rows are the trained rows or paraphrases, which a model cannot answer untrained."""


def check_names(names: list[str]) -> None:
    """Raise `InputError` for duplicate task names or names that cannot be folder names."""
    for index, name in enumerate(names):
        separated = any(c in "/\\" or not c.isprintable() for c in name)
        if name in ("", ".", "..") or separated or len(name.encode()) > _MAX_NAME_BYTES:
            raise InputError(f"task {index + 1}: name {name!r} cannot be used as a folder name")
        if name in names[:index]:
            raise InputError(f"task {index + 1}: name {name!r} is already used by another task")


def is_empty(row: Row) -> bool:
    """Whether a row is skipped because its prompt or answer is blank."""
    return not row.prompt.strip() or not row.answer.strip()


def check_rows(
    task: Task, split: str, check: Callable[[Row], None] = lambda row: None, *, file: str = ""
) -> int:
    """Read a split once, call `check` with every non-empty row, and return their number.

    Raises `InputError` for a row that cannot be read, and for a split without non-empty rows, whose
    message names the `file` if given.
    """
    num_rows = 0
    for row in task.splits[split]():
        if not is_empty(row):
            check(row)
            num_rows += 1
    if num_rows == 0:
        where = f"{file} has no row" if file else f"the {split} split has no rows"
        raise InputError(f"task {task.name}: {where} with prompt and answer")
    return num_rows
