"""Conversations as users bring them: checked messages, in one form whatever they came in."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any

from agcl.errors import InputError
from agcl.tasks.records import Number, kind, text
from agcl.tasks.task import Conversation, Row

ROLES = ("system", "user", "assistant", "tool")


def row_of(messages: Any, tools: Any, place: str, *, context: int = 0) -> Row:
    """Make a row of a list of messages (or its JSON text), up to the last assistant turn.

    `context`: number of messages at the start whose assistant turns carry no loss; nor do those
    with OpenAI's `weight` 0. Raises `InputError` naming place and message for an unknown role,
    content that is not text, a first turn (after system messages) that is not the user's, no
    assistant turn after the context, or a last one of weight 0.
    """
    checked = [
        _message(value, f"{place}, message {number}")
        for number, value in enumerate(_list(messages, "messages", place), start=1)
    ]
    weights = [message.pop("weight", 1) for message in checked]
    last = max((n for n, m in enumerate(checked) if m["role"] == "assistant"), default=-1)
    if last < context:
        raise InputError(f"{place}: no assistant message, so nothing to learn")
    first = next(m["role"] for m in checked if m["role"] != "system")
    if first != "user":
        raise InputError(f"{place}: the first turn is the {first}'s, not the user's")
    if not weights[last]:
        raise InputError(
            f"{place}, message {last + 1}: the last assistant message has weight 0, but is the one "
            "that is scored; leave it out"
        )
    *before, answer = checked[: last + 1]
    unlearned = {n for n, m in enumerate(before) if m["role"] == "assistant" and not weights[n]}
    given = tuple(_object(tool, f"{place}: a tool") for tool in _list(tools or [], "tools", place))
    _check_json([*before, answer, *given], place)
    return Row(
        "\n".join(message["content"] for message in before),
        answer["content"]
        or json.dumps(answer.get("tool_calls", ""), ensure_ascii=False).strip('"'),
        conversation=Conversation((*before, answer), given, context, place, frozenset(unlearned)),
    )


def _check_json(values: list[Any], place: str) -> None:
    """Raise `InputError` for what a template could not write as JSON, or a tokenizer not read."""
    try:
        text({"messages": json.dumps(values, ensure_ascii=False)}, "messages", place)
    except (TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{place}: not JSON ({error})") from None


def kinds_of_turns(conversation: Conversation) -> set[str]:
    """What a chat template may treat differently: who follows whom, tools, several answers.

    Also which keys a message has, how many calls, whether it has a thought, and whether it is last.
    """
    messages = conversation.messages
    roles = ["", *(message["role"] for message in messages)]
    kinds = {f"{before} {after}" for before, after in pairwise(roles)}
    kinds |= {"tools"} if conversation.tools else set()
    kinds |= {"unlearned"} if conversation.unlearned else set()
    kinds |= {"last " * (n == len(messages)) + _kind(m) for n, m in enumerate(messages, start=1)}
    return kinds | ({"several"} if roles.count("assistant") > 1 else set())


def _kind(message: Mapping[str, Any]) -> str:
    content = message["content"]
    calls = min(len(message.get("tool_calls", ())), 2)  # Llama 3.1's template refuses several.
    thought, blank = "</think>" in content, not content.strip()
    return f"{message['role']} {sorted(message)} {calls=} {thought=} {blank=}"


def _list(value: Any, name: str, place: str) -> Sequence[Any]:
    """A list, or the one that JSON text in a column of CSV or Parquet stands for."""
    if isinstance(value, str):
        with suppress(ValueError):
            value = json.loads(value)
    if not isinstance(value, list | tuple):
        raise InputError(f"{place}: {name!r} is {kind(value)}, not a list")
    return value


def _object(value: Any, place: str) -> dict[str, Any]:
    """An object with JSON's numbers, without the keys that a table adds to all of a column."""
    if not isinstance(value, Mapping):
        raise InputError(f"{place} is {kind(value)}, not an object")
    return {key: _plain(each) for key, each in value.items() if each is not None}


def _plain(value: Any) -> Any:
    """A JSON value with numbers instead of their text: templates write tools as JSON."""
    if isinstance(value, Number):
        with suppress(ValueError):
            return int(value)
        return float(value)
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


def _message(value: Any, place: str) -> dict[str, Any]:
    message = _object(value, place)
    role = message.get("role")
    if role not in ROLES:
        raise InputError(f"{place}: role must be one of {', '.join(ROLES)}, not {role!r}")
    if message.get("weight", 1) not in (0, 1):
        raise InputError(f"{place}: weight {message['weight']!r} is neither 0 nor 1")
    if not message.get("tool_calls"):  # Some templates take an empty list for calls.
        message.pop("tool_calls", None)
    elif calls := message["tool_calls"]:
        message["tool_calls"] = [_call(each, place) for each in _list(calls, "tool_calls", place)]
    content = value.get("content")
    if isinstance(content, list | tuple):
        content = "".join(_part(part, place) for part in content)
    if content is None and (message.get("tool_calls") and role == "assistant"):
        content = ""
    return message | {"content": text({"content": content}, "content", place)}


def _part(part: Any, place: str) -> str:
    """The text of one of OpenAI's content parts."""
    found = _object(part, f"{place}: a part of the content")
    if found.get("type") != "text":
        raise InputError(f"{place}: content of type {found.get('type')!r}; only text is supported")
    return text(found, "text", place)


def _call(value: Any, place: str) -> dict[str, Any]:
    """A call of a tool; OpenAI writes its arguments as JSON text, templates expect an object."""
    call = _object(value, f"{place}: a tool call")
    function = call.get("function")
    if isinstance(function, dict) and isinstance(function.get("arguments"), str):
        with suppress(ValueError):
            call["function"] = function | {"arguments": json.loads(function["arguments"])}
    return call
