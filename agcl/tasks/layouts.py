"""Layouts of records: which columns become a row's prompt and answer, or its conversation."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from agcl.errors import InputError
from agcl.tasks import messages
from agcl.tasks.records import Records, kind, text
from agcl.tasks.task import TEST, TRAIN, Row, Task
from agcl.tasks.template import columns, render

TEMPLATE = "template"
_TELLING = {
    "messages": "messages",
    "conversations": "sharegpt",
    "completion": "prompt_completion",
    "instruction": "alpaca",
}
"""Columns by which a record that lacks those of its templates is taken for another layout."""
_SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "observation": "tool",
    **{role: role for role in messages.ROLES},
}
_INSTRUCTION = (
    "Below is an instruction that describes a task{input}. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n"
)
"""Stanford Alpaca's (Taori 2023), for models without a chat template."""
_WITH_INPUT = ", paired with an input that provides further context"


def task_of_records(
    name: str,
    splits: Mapping[str, Callable[[], Records]],
    *,
    layout: str = TEMPLATE,
    scorer: str = "exact_match",
    **settings: Any,
) -> Task:
    """A task from streams of records by split.

    `layout` is `template`, with the settings `prompt` and `answer` (text with column names in
    braces), or a name in `LAYOUTS`; `alpaca` with the setting `chat`, whether a chat template
    renders its rows. Without a test split the training rows are scored.
    """
    rows = (
        partial(_of_template, **settings)
        if layout == TEMPLATE
        else partial(LAYOUTS[layout], **settings)
    )
    return Task(
        name=name,
        splits={split: partial(_rows, read, rows) for split, read in splits.items()},
        scored={TEST: TEST} if TEST in splits else {"memorization": TRAIN},
        scorer=scorer,
        memorized=TEST not in splits,
    )


def _rows(
    read: Callable[[], Records], row: Callable[[Mapping[str, Any], str], Row]
) -> Iterator[Row]:
    for place, record in read():
        try:
            yield row(record, place)
        except RecursionError:
            raise InputError(f"{place}: nested too deeply") from None


def _of_template(record: Mapping[str, Any], place: str, *, prompt: str, answer: str) -> Row:
    try:
        return Row(render(prompt, record, place), render(answer, record, place))
    except InputError as error:
        missing = {*columns(prompt), *columns(answer)} - {*record}
        other = next((name for column, name in _TELLING.items() if column in record), None)
        if missing and other:
            raise InputError(f"{error}; is its layout {other}?") from None
        raise


def _of_messages(record: Mapping[str, Any], place: str) -> Row:
    """`messages`, and perhaps `tools`, as OpenAI and TRL have them."""
    return messages.row_of(_column(record, "messages", place), record.get("tools"), place)


def _of_prompt_completion(record: Mapping[str, Any], place: str) -> Row:
    """TRL's: texts as they are, or lists of messages, of which the completion is learned."""
    prompt, completion = (_given(_column(record, k, place)) for k in ("prompt", "completion"))
    if isinstance(prompt, list) and isinstance(completion, list):
        tools = record.get("tools")
        return messages.row_of([*prompt, *completion], tools, place, context=len(prompt))
    if isinstance(prompt, list) or isinstance(completion, list):
        raise InputError(
            f"{place}: 'prompt' is {kind(prompt)} and 'completion' {kind(completion)}; "
            "both must be text, or both lists of messages"
        )
    return Row(text(record, "prompt", place), text(record, "completion", place))


def _given(value: Any) -> Any:
    """A value, or the messages that JSON text in a column of CSV or Parquet stands for."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(ValueError, RecursionError):
            found = json.loads(value)
            if found and all(isinstance(each, dict) and "role" in each for each in found):
                return found
    return value


def _of_alpaca(record: Mapping[str, Any], place: str, *, chat: bool = False) -> Row:
    """`instruction`, perhaps `input`, and `output`."""
    instruction, answer = (text(record, key, place) for key in ("instruction", "output"))
    given = "" if record.get("input") is None else text(record, "input", place)
    if not instruction.strip():
        return Row("", answer)
    if chat:
        return Row(f"{instruction}\n\n{given}" if given.strip() else instruction, answer)
    head = _INSTRUCTION.format(input=_WITH_INPUT if given.strip() else "")
    middle = f"\n\n### Input:\n{given}" if given.strip() else ""
    return Row(f"{head}{instruction}{middle}\n\n### Response:\n", answer)


def _of_sharegpt(record: Mapping[str, Any], place: str) -> Row:
    """`conversations` of `from` and `value` (or messages), perhaps `system` and `tools`."""
    turns = _column(record, "conversations", place)
    if not isinstance(turns, list):
        raise InputError(f"{place}: 'conversations' is {kind(turns)}, not a list")
    found = [_turn(turn, f"{place}, message {n}") for n, turn in enumerate(turns, start=1)]
    if record.get("system"):
        found.insert(0, {"role": "system", "content": record["system"]})
    return messages.row_of(found, record.get("tools"), place)


def _turn(turn: Any, place: str) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise InputError(f"{place} is {kind(turn)}, not an object")
    if "from" not in turn and "role" in turn:  # Messages under the name of ShareGPT's column.
        return dict(turn)
    role = turn.get("from")
    if not isinstance(role, str) or role not in _SHAREGPT_ROLES:
        raise InputError(f"{place}: from must be one of {', '.join(_SHAREGPT_ROLES)}, not {role!r}")
    weight = {"weight": turn["weight"]} if "weight" in turn else {}
    return {"role": _SHAREGPT_ROLES[role], "content": turn.get("value"), **weight}


def _column(record: Mapping[str, Any], name: str, place: str) -> Any:
    if name not in record:
        raise InputError(f"{place}: no column {name!r} (columns: {', '.join(record)})")
    return record[name]


LAYOUTS: dict[str, Callable[..., Row]] = {
    "messages": _of_messages,
    "prompt_completion": _of_prompt_completion,
    "alpaca": _of_alpaca,
    "sharegpt": _of_sharegpt,
}
"""By name: from a record and its place to its row."""
