"""Conversations rendered by a tokenizer's chat template, and where its assistant turns are."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from agcl.errors import InputError, one_line
from agcl.tasks.task import Conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
_MARK = "\N{SNOWMAN}agcl\N{SNOWMAN}"
_REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys of messages for what an assistant thought before its words."""
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Turns(NamedTuple):
    """A conversation as text, up to the end of its last assistant turn."""

    prompt: str
    """What the model sees before it writes the last turn, as in generation."""
    answer: str
    end: str
    """The token by which the template ends the turn; empty if it writes none."""
    earlier: tuple[Span, ...]
    """Characters of the prompt that are earlier assistant turns, with their end tokens."""


class Template(NamedTuple):
    """A tokenizer's chat template, and what it writes around an assistant's words."""

    tokenizer: "PreTrainedTokenizerBase"
    header: str
    """Text before the words: the generation prompt."""
    tail: str
    """Text after the words, such as `<|im_end|>` and a newline."""
    end: str
    """The part of the tail that the model must write: through its first special token."""
    special: re.Pattern[str]
    """Matches any special token."""
    lead: str = ""
    """Text between header and words, such as Qwen3's empty `<think>` block."""
    closing: str = ""
    """Text after the end of a conversation only, such as Phi-3's end-of-text token."""


def template_of(tokenizer: "PreTrainedTokenizerBase", place: str = "") -> Template:
    """The template of a tokenizer. Raises `InputError`, at the place of a row, if it has none."""
    if not tokenizer.chat_template:
        raise InputError(
            f"{place and f'{place}: '}the tokenizer in {tokenizer.name_or_path} has no chat "
            "template, which messages and chat_template: true need"
        )
    added = (token.content for token in tokenizer.added_tokens_decoder.values())
    tokens = {*tokenizer.all_special_tokens, *added}
    longest_first = sorted(filter(str.strip, tokens), key=len, reverse=True)
    special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
    asked = [{"role": "user", "content": "?"}]
    header = lead = tail = closing = ""
    try:
        question = _apply(tokenizer, asked)
        prompt = _apply(tokenizer, asked, add_generation_prompt=True)
        answered = _apply(tokenizer, [*asked, {"role": "assistant", "content": _MARK}])
        alone = question.removesuffix(tokenizer.eos_token or "")
        if not answered.startswith(question) and answered.startswith(alone):
            question, closing = alone, question[len(alone) :]
        header = prompt.removeprefix(question) if prompt.startswith(question) else ""
        before, _, tail = answered.removesuffix(closing).rpartition(_MARK)
        lead = before.removeprefix(prompt) if before.startswith(prompt) else ""
    except Exception:  # The template's own: it may want a system message. Rows tell by themselves.
        pass
    space = len(tail) - len(tail.lstrip())
    found = special.match(tail, space)
    end = tail[: found.end()] if found else ""
    return Template(tokenizer, header, tail, end, special, lead, closing)


def around_user(tokenizer: "PreTrainedTokenizerBase") -> tuple[str, str] | None:
    """The template's text before a user's words, and from there to the assistant's answer.

    None without a template, or if it does not render a single user message verbatim and once.
    """
    if not tokenizer.chat_template:
        return None
    try:
        asked = [{"role": "user", "content": _MARK}]
        before, after = _apply(tokenizer, asked, add_generation_prompt=True).split(_MARK)
    except Exception:  # The template's own, such as a missing system message, or any of Jinja's.
        return None
    return before, after


def can_teach(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether there is a chat template, and rows of a question and its answer can be rendered."""
    asked = {"role": "user", "content": "?"}
    try:
        turns(template_of(tokenizer), Conversation((asked, {"role": "assistant", "content": "!"})))
    except InputError:
        return False
    return True


def turns(template: Template, conversation: Conversation) -> Turns:
    """Render a conversation and find its assistant turns.

    Turns are found by the template's generation mask (`{% generation %}`) if it has one, otherwise
    by rendering the messages before each turn and through it. The last turn starts where the
    generation prompt ends. A turn includes the template's end token but not the separator after it.
    Raises `InputError` naming the row if the template cannot render it, renders messages
    differently when others follow, or leaves out the answer, its reasoning, tools, calls of these
    or what they answer.
    """
    messages = conversation.messages
    whole = _render(template, conversation, len(messages))
    _check_left_out(template, conversation, whole)
    prompt = _render(template, conversation, len(messages) - 1, prompt=True)
    if not whole.startswith(prompt):
        raise _no_prefix(template, conversation, len(messages) - 1, prompt, whole)
    find = _by_mask if _has_mask(template, conversation) else _by_prefixes
    earlier = [
        (start, _ended(template, whole, start, stop)[1])
        for start, stop in find(template, conversation, whole)
        if start < len(prompt)
    ]
    stop, end = _ended(template, whole, len(prompt), len(whole))
    if messages[-1]["content"].strip() and not whole[len(prompt) : stop].strip():
        raise _error(template, conversation, "does not render the assistant's answer")
    written = template.special.findall(whole[stop:end])
    return Turns(
        prompt,
        whole[len(prompt) : end - len("".join(written))],
        "".join(written),
        tuple((start, min(stop, len(prompt))) for start, stop in earlier if start < stop),
    )


def _check_left_out(template: Template, conversation: Conversation, whole: str) -> None:
    """Refuse tools, calls of them, what they answer, or reasoning that a template leaves out.

    The model would learn an empty turn in place of a call, and an answer from nothing. Reasoning
    must be rendered in a last turn: many templates drop that of earlier turns on purpose.
    """
    messages = conversation.messages
    _check_reasoning(template, conversation)
    no_calls = tuple({k: v for k, v in m.items() if k != "tool_calls"} for m in messages)
    others = tuple({**m, "content": _MARK} if m["role"] == "tool" else m for m in messages)
    for changed, what in (
        (replace(conversation, tools=()), "the tools"),
        (replace(conversation, messages=no_calls), "tool_calls"),
        (replace(conversation, messages=others), "messages of the role tool"),
    ):
        if changed != conversation and _renders_as(template, changed, whole):
            raise _error(template, conversation, f"leaves out {what}")


def _check_reasoning(template: Template, conversation: Conversation) -> None:
    """Refuse reasoning in a key that the template does not read, even where its turn is last."""
    for number, message in reversed([*enumerate(conversation.messages, start=1)]):
        key = next((key for key in _REASONING if message.get(key)), None)
        if key and message["role"] == "assistant":
            *before, last = conversation.messages[:number]
            without = {k: v for k, v in last.items() if k != key}
            whole = _render(template, conversation, number)
            changed = replace(conversation, messages=(*before, without))
            if _renders_as(template, changed, whole):
                raise _error(template, conversation, f"leaves out {key}")
            return


def _renders_as(template: Template, conversation: Conversation, text: str) -> bool:
    try:
        return _render(template, conversation, len(conversation.messages)) == text
    except InputError:  # So it reads what is missing: some want a call before a tool's answer.
        return False


def _by_prefixes(template: Template, conversation: Conversation, whole: str) -> list[Span]:
    found = []
    for number, message in enumerate(conversation.messages[:-1]):
        learned = number >= conversation.context and number not in conversation.unlearned
        if message["role"] == "assistant" and learned:
            before = _render(template, conversation, number, prompt=True)
            up_to = _render(template, conversation, number + 1)
            if not up_to.startswith(before):
                raise _no_prefix(template, conversation, number, before, up_to)
            if not whole.startswith(up_to):
                raise _no_prefix(template, conversation, number + 1, up_to, whole)
            found.append((len(before), len(up_to)))
    return found


def _by_mask(template: Template, conversation: Conversation, whole: str) -> list[Span]:
    from transformers.utils.chat_template_utils import render_jinja_template

    tokenizer, tools = template.tokenizer, list(conversation.tools) or None
    # `apply_chat_template` gives the mask by token, which is ambiguous where a token straddles.
    _, spans = render_jinja_template(
        [list(conversation.messages)],
        tools=tools,
        chat_template=tokenizer.get_chat_template(None, tools),
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )

    def place(number: int) -> int:
        """Where message `number` starts."""
        before = _render(template, conversation, number) if number else ""
        if not whole.startswith(before):
            raise _no_prefix(template, conversation, number, before, whole)
        return len(before)

    first = place(conversation.context)
    unlearned = [(place(number), place(number + 1)) for number in sorted(conversation.unlearned)]
    return [
        (_behind_header(template.header, whole, start), stop)
        for start, stop in spans[0]
        if start >= first and not any(a <= start < b for a, b in unlearned)
    ]


def _behind_header(header: str, whole: str, start: int) -> int:
    """Where a turn's words start, whose mask starts before, inside or behind the header."""
    for before in range(min(len(header), start + 1)):
        if whole.startswith(header, start - before):
            return start - before + len(header)
    return start


def _has_mask(template: Template, conversation: Conversation) -> bool:
    tools = list(conversation.tools) or None
    return bool(_GENERATION.search(template.tokenizer.get_chat_template(None, tools)))


def _ended(template: Template, whole: str, start: int, stop: int) -> Span:
    """Where the words of a turn stop, and where it ends: behind its end token."""
    tail, end = template.tail, template.end
    piece = whole[start:stop]
    for closing in filter(None, (tail, end)):
        if piece.endswith(closing):
            words = stop - len(closing)
            return words, words + len(end)
    if end and whole.startswith(end, stop):  # A mask on the words alone.
        return stop, stop + len(end)
    # Other kinds of turns, such as calls of tools, may end otherwise.
    last = next(reversed([*template.special.finditer(piece.rstrip())]), None)
    if last and last.end() == len(piece.rstrip()):
        return start + last.start(), start + last.end()
    return start + len(piece.rstrip()), start + len(piece.rstrip())


def _render(
    template: Template, conversation: Conversation, number: int, *, prompt: bool = False
) -> str:
    """The first messages as text, open for more; with `prompt`, to where the words start."""
    messages = conversation.messages[:number]
    tools = list(conversation.tools) or None
    try:
        text = _apply(template.tokenizer, messages, tools=tools, add_generation_prompt=prompt)
        return text if prompt else text.removesuffix(template.closing)
    except Exception as error:  # The template's own words, or any of Jinja's.
        reason = f"cannot render the messages: {one_line(error, 200)}"
        raise _error(template, conversation, reason) from None


def _apply(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Mapping[str, Any]], **options: Any
) -> str:
    return cast(str, tokenizer.apply_chat_template(list(messages), tokenize=False, **options))


def _no_prefix(
    template: Template, conversation: Conversation, number: int, part: str, longer: str
) -> InputError:
    """The error for `part`, the first `number` messages, that is not how `longer` starts."""
    pairs = enumerate(zip(part, longer, strict=False))
    same = next((i for i, (one, other) in pairs if one != other), min(len(part), len(longer)))
    here, there = (text[same : same + 40] for text in (part, longer))
    several = sum(message["role"] == "assistant" for message in conversation.messages) > 1
    advice = "give one assistant turn per row, or a template that keeps them"
    return _error(
        template,
        conversation,
        f"renders the messages before message {number + 1} differently once that follows ({here!r} "
        f"becomes {there!r}), so the model would learn from text that it never sees; "
        + (advice if several else "correct the template, or train without it"),
    )


def _error(template: Template, conversation: Conversation, reason: str) -> InputError:
    place = f"{conversation.place}: " if conversation.place else ""
    return InputError(f"{place}the chat template of {template.tokenizer.name_or_path} {reason}")
