"""Templates for prompts and answers: text with column names in braces, `{question}\\nAnswer:`."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from string import Formatter
from typing import Any

from agcl.errors import InputError
from agcl.tasks.records import Records, text
from agcl.tasks.task import TEST, TRAIN, Row, Task


def columns(template: str) -> list[str]:
    """The columns that a template names. Raises `InputError` for an invalid template."""
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise InputError(f"template {template!r}: {error}; write {{{{ for a brace") from None
    if any(column == "" or spec or conversion for _, column, spec, conversion in parts):
        raise InputError(f"template {template!r}: only {{column}} is allowed in braces")
    return [column for _, column, _, _ in parts if column is not None]


def render(template: str, record: Mapping[str, Any], place: str) -> str:
    """Fill in a record's columns; empty, whatever the template adds, if all of them are blank.

    Raises `InputError` naming location and column if one is missing. The text in braces is taken as
    a column name, so a template cannot access attributes of values.
    """
    parts = [
        (literal, None if column is None else text(record, column, place))
        for literal, column, _, _ in Formatter().parse(template)
    ]
    values = [value for _, value in parts if value is not None]
    if values and not any(map(str.strip, values)):
        return ""
    return "".join(literal + (value or "") for literal, value in parts)


def task_of_records(
    name: str,
    splits: Mapping[str, Callable[[], Records]],
    *,
    prompt: str,
    answer: str,
    scorer: str = "exact_match",
) -> Task:
    """A task from streams of records by split; `prompt` and `answer` are templates.

    Without a test split the training rows are scored.
    """
    return Task(
        name=name,
        splits={split: partial(_rows, read, prompt, answer) for split, read in splits.items()},
        scored={TEST: TEST} if TEST in splits else {"memorization": TRAIN},
        scorer=scorer,
        memorized=TEST not in splits,
    )


def _rows(read: Callable[[], Records], prompt: str, answer: str) -> Iterator[Row]:
    for place, record in read():
        yield Row(render(prompt, record, place), render(answer, record, place))
