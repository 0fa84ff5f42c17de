"""Messages as users bring them: what is read, and which row is named where something is wrong."""

import json

import pytest
from reference import chat

from agcl.errors import InputError
from agcl.tasks import is_empty, messages, selection
from agcl.tasks.records import Number

ASKED, SAID = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me"}


def row_of(conversation, tools=None, **options):
    return messages.row_of(conversation, tools, "f, line 2", **options)


@pytest.mark.parametrize("calls", [[], None, ""])
def test_no_calls_of_tools_are_left_out(calls):
    """Mistral's template takes an empty list for calls, and writes it instead of the content."""
    row = row_of([ASKED, {**SAID, "tool_calls": calls}])
    assert row.conversation.messages == (ASKED, SAID)


@pytest.mark.parametrize(
    ("conversation", "said"),
    [
        ([], "f, line 2: no assistant message"),
        ([ASKED], "f, line 2: no assistant message"),
        ("Who?", "f, line 2: 'messages' is text, not a list"),
        (None, "f, line 2: 'messages' is null, not a list"),
        (["Who?", SAID], "f, line 2, message 1 is text, not an object"),
        ([SAID, ASKED, SAID], "f, line 2: the first turn is the assistant's, not the user's"),
        ([{"role": "tool", "content": "5"}, SAID], "f, line 2: the first turn is the tool's"),
        ([ASKED, {"role": "bot", "content": "Me"}], "line 2, message 2: role must be one of sys"),
        ([{"content": "Who?"}, SAID], "f, line 2, message 1: role must be one of system, user"),
        ([{"role": "user"}, SAID], "f, line 2, message 1: 'content' is null, not text"),
        ([ASKED, {"role": "assistant", "content": {"a": 1}}], "message 2: 'content' is an object"),
        (
            [{"role": "user", "content": [{"type": "image_url"}]}, SAID],
            "f, line 2, message 1: content of type 'image_url'; only text is supported",
        ),
        ([ASKED, {**SAID, "weight": 0.5}], "f, line 2, message 2: weight 0.5 is neither 0 nor 1"),
        (
            [ASKED, SAID, ASKED, {**SAID, "weight": 0}, ASKED],
            "f, line 2, message 4: the last assistant message has weight 0",
        ),
        ([ASKED, {**SAID, "tool_calls": 5}], "message 2: 'tool_calls' is a number, not a list"),
    ],
)
def test_a_bad_row_is_named_with_its_message(conversation, said):
    with pytest.raises(InputError) as error:
        row_of(conversation)
    assert said in str(error.value)


def test_bad_tools_are_named():
    with pytest.raises(InputError, match="f, line 2: a tool is text, not an object"):
        row_of([ASKED, SAID], ["add"])


def test_parts_of_text_are_joined_and_json_text_is_a_list():
    parts = [{"type": "text", "text": "Wh"}, {"type": "text", "text": "o?"}]
    of_parts = row_of([{"role": "user", "content": parts}, SAID])
    assert of_parts == row_of([ASKED, SAID]) == row_of(json.dumps([ASKED, SAID]))
    assert (of_parts.prompt, of_parts.answer) == ("Who?", "Me")


def test_calls_have_numbers_and_arguments_as_objects_whatever_they_came_in():
    """Templates write them as JSON; files give numbers as their text, OpenAI arguments as text."""
    call = chat.CALLS[1]["tool_calls"][0]["function"]
    for arguments in ({"a": Number("2"), "b": Number("3")}, '{"a": 2, "b": 3}'):
        asked, _, *rest = chat.CALLS
        calls = [{"type": "function", "function": {**call, "arguments": arguments}}]
        said = {"role": "assistant", "content": None, "tool_calls": calls, "name": None}
        row = row_of([asked, said, *rest], chat.TOOLS)
        assert row.conversation.messages[1] == {**chat.CALLS[1], "content": ""}
        assert row == row_of(chat.CALLS, chat.TOOLS)
    last = row_of(chat.CALLS[:2], json.dumps(chat.TOOLS))
    assert json.loads(last.answer)[0]["function"]["name"] == "add"
    assert last.conversation.tools == tuple(chat.TOOLS)


def test_messages_of_another_make_are_of_another_kind():
    """A template may refuse what it finds in a message, such as Llama 3.1 two calls."""
    call = chat.CALLS[1]["tool_calls"][0]
    variants = [
        [ASKED, SAID],
        [ASKED, {**SAID, "reasoning_content": "So."}],
        [ASKED, {**SAID, "content": "<think>So.</think>Me"}],
        [ASKED, {**SAID, "content": "", "tool_calls": [call]}],
        [ASKED, {**SAID, "content": "", "tool_calls": [call] * 2}],
        [ASKED, {**SAID, "reasoning_content": "So.", "tool_calls": [call]}],
        [ASKED, SAID, ASKED, SAID],
        [ASKED, {**SAID, "weight": 0}, ASKED, SAID],
    ]
    seen = set()
    for talk in variants:
        kinds = messages.kinds_of_turns(row_of(talk).conversation)
        assert not seen.issuperset(kinds), talk
        seen |= kinds
    assert seen.issuperset(messages.kinds_of_turns(row_of([ASKED, SAID]).conversation))


def test_a_blank_last_turn_is_an_empty_row():
    assert is_empty(row_of([ASKED, {"role": "assistant", "content": " "}]))
    assert not is_empty(row_of([ASKED, SAID]))


def test_rows_are_placed_by_their_words_alone():
    """What a share of the rows for validation goes by."""
    one, same, other = (
        selection.position(messages.row_of(talk, None, place), seed=0)
        for talk, place in (([ASKED, SAID], "a"), ([ASKED, SAID], "b"), ([ASKED, SAID] * 2, "a"))
    )
    assert one == same != other
