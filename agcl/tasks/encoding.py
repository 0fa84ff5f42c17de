"""Tokenizing prompts and answers, and memory-mapped files of token ids."""

from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Sequence
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import pyarrow as pa

from agcl.errors import InputError
from agcl.tasks.chat_template import Span, template_of, turns
from agcl.tasks.selection import position
from agcl.tasks.task import Conversation, Row, is_empty

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("prompt_tokens", pa.int32()),
        ("earlier", pa.list_(pa.list_(pa.int32()))),  # Null for rows without a chat template.
        ("prompt", pa.string()),
        ("answer", pa.string()),
        (
            "position",
            pa.float64(),
        ),  # `selection.position`, by which scored rows are shared out.
        ("references", pa.list_(pa.string())),  # Further right answers; null where there are none.
        ("kept", pa.int32()),  # Tokens at the start of the prompt that `cut_left` keeps.
        ("question", pa.string()),  # What the user asks, for scorers; null if that is the prompt.
    ]
)


class Encoded(NamedTuple):
    """One tokenized row: prompt (at least one token), answer, token that ends the answer."""

    input_ids: list[int]
    prompt_tokens: int
    """Number of tokens before the answer; of a conversation, before its last assistant turn."""
    earlier: tuple[Span, ...] = ()
    """Tokens of the prompt that are earlier assistant turns, with loss but without score."""

    @property
    def spans(self) -> list[Span]:
        """The tokens with loss. No token predicts the row's first."""
        each = (*self.earlier, (self.prompt_tokens, len(self.input_ids)))
        return [(max(1, start), stop) for start, stop in each]

    @property
    def loss_tokens(self) -> int:
        """Number of tokens with loss."""
        return sum(stop - start for start, stop in self.spans)


class Text(NamedTuple):
    """A row as text, to which any chat template is already applied."""

    prompt: str
    answer: str
    end: str | None = None
    """Text that ends the answer; if empty or None, the end-of-sequence token. None marks a row
    without a chat template, whose prompt also gets special tokens such as BOS."""
    earlier: tuple[Span, ...] = ()
    """Characters of the prompt that are earlier assistant turns."""
    kept: int = 0
    """Characters at the start of the prompt that truncation keeps."""


def encode(
    tokenizer: "PreTrainedTokenizerBase", rows: Iterable[Row], *, chat: bool = False
) -> pa.Table:
    """Tokenize rows into a table of `SCHEMA`.

    The tokenizer's special tokens (such as BOS) are added to the prompt, and one end-of-sequence
    token to the answer. Conversations are rendered by the tokenizer's chat template, which provides
    special tokens and separators, and ends the answer. With `chat` other rows are conversations
    too: the prompt is the user's message, and the answer, without leading whitespace, the
    assistant's. Raises `InputError` for a conversation that cannot be rendered.
    """
    rows = list(rows)
    texts = _texts(tokenizer, rows, chat)
    encoded = encode_texts(tokenizer, texts)
    return pa.table(
        {
            "input_ids": [row.input_ids for row in encoded],
            "prompt_tokens": [row.prompt_tokens for row in encoded],
            "earlier": [
                None if text.end is None else row.earlier
                for row, text in zip(encoded, texts, strict=True)
            ],
            "prompt": [text.prompt for text in texts],
            "answer": [text.answer for text in texts],
            "position": [position(row, seed=0) for row in rows],
            "references": [row.references or None for row in rows],
            "kept": [
                _kept_tokens(tokenizer, text, row) for text, row in zip(texts, encoded, strict=True)
            ],
            "question": [
                None if text.end is None else _question(row)
                for text, row in zip(texts, rows, strict=True)
            ],
        },
        schema=SCHEMA,
    )


def _texts(tokenizer: "PreTrainedTokenizerBase", rows: Sequence[Row], chat: bool) -> list[Text]:
    template = None
    texts = []
    for row in rows:
        if is_empty(row) or not (chat or row.conversation):
            texts.append(Text(row.prompt, row.answer, kept=row.kept))
            continue
        conversation = row.conversation or _as_conversation(row)
        template = template or template_of(tokenizer, conversation.place)
        text = Text(*turns(template, conversation))
        if row.kept and (start := text.prompt.find(row.prompt[: row.kept])) >= 0:
            text = text._replace(kept=start + row.kept)
        texts.append(text)
    return texts


def _question(row: Row) -> str:
    """What a chat template was applied to; of a conversation, the user's last words."""
    talk = row.conversation.messages if row.conversation else ()
    asked = [message["content"] for message in talk if message["role"] == "user"]
    return str(asked[-1]) if asked else row.prompt


def _as_conversation(row: Row) -> Conversation:
    asked = {"role": "user", "content": row.prompt}
    return Conversation((asked, {"role": "assistant", "content": row.answer.lstrip()}))


def encode_texts(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[Text]) -> list[Encoded]:
    """Tokenize rows.

    The prompt gets the tokens that it has alone, as in generation. The answer gets the tokens that
    it has after the prompt: many tokenizers would add a space to an answer tokenized alone.
    """
    plain = [text.end is None for text in texts]
    found = {
        special: iter(
            _encoded(tokenizer, [t for t, p in zip(texts, plain, strict=True) if p == special])
        )
        for special in (False, True)
    }
    return [next(found[special]) for special in plain]


def _encoded(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[Text]) -> list[Encoded]:
    """Token ids of rows that all are with, or all without, a chat template."""
    if not texts:
        return []
    end, special = tokenizer.eos_token_id, texts[0].end is None
    pairs = [t for text in texts for t in (text.prompt, text.prompt + text.answer + _end(text))]
    ids = tokenizer(pairs, add_special_tokens=special)["input_ids"]
    encoded = []
    for text, prompt, whole in zip(texts, ids[::2], ids[1::2], strict=True):
        if _has_second_bos(tokenizer, text, whole):
            prompt, whole = prompt[1:], whole[1:]
        if special and prompt[-1:] == [end]:
            # Some tokenizers append EOS to every text; the answer must follow the prompt directly.
            prompt = prompt[:-1]
        follows = whole[: len(prompt)] == prompt
        answer = (
            whole[len(prompt) :] if follows else _continuation(tokenizer, text.answer + _end(text))
        )
        last = answer[-1] if text.end else end
        while answer[-1:] == [last]:  # The answer's text may end with it too.
            answer = answer[:-1]
        earlier = _tokens_of(tokenizer, text) if text.earlier else ()
        encoded.append(Encoded([*prompt, *answer, last], len(prompt), earlier))
    return encoded


def _has_second_bos(tokenizer: "PreTrainedTokenizerBase", text: Text, ids: Sequence[int]) -> bool:
    """Whether the tokenizer put BOS before a prompt that begins with its text."""
    start = tokenizer.bos_token
    if not start or text.end is not None or not text.prompt.startswith(start):
        return False
    written = 1 + text.prompt.startswith(2 * start)
    return list(ids[: written + 1]) == [tokenizer.bos_token_id] * (written + 1)


def _end(text: Text) -> str:
    return text.end or ""


def _tokens_of(tokenizer: "PreTrainedTokenizerBase", text: Text) -> tuple[Span, ...]:
    """The tokens that start in each span of the prompt's characters."""
    starts = _starts(tokenizer, text)
    spans = ((bisect_left(starts, a), bisect_left(starts, b)) for a, b in text.earlier)
    return tuple((first, stop) for first, stop in spans if first < stop)


def _kept_tokens(tokenizer: "PreTrainedTokenizerBase", text: Text, row: Encoded) -> int:
    """How many tokens of the prompt start in the characters that truncation keeps."""
    if not text.kept:
        return 0
    starts = _starts(tokenizer, text)[: row.prompt_tokens]  # Some tokenizers append EOS.
    return bisect_left(starts, text.kept)


def _starts(tokenizer: "PreTrainedTokenizerBase", text: Text) -> list[int]:
    """The character at which each token of the prompt starts; 0 for special tokens before it."""
    if not tokenizer.is_fast:
        raise InputError(
            f"the tokenizer in {tokenizer.name_or_path} does not report token offsets, which "
            "conversations with several assistant turns and instructions that truncation keeps "
            "need (tokenizer.json is missing)"
        )
    special = text.end is None
    read = tokenizer(text.prompt, add_special_tokens=special, return_offsets_mapping=True)
    starts = [start for start, _ in read["offset_mapping"]]
    return starts[_has_second_bos(tokenizer, text, read["input_ids"]) :]


def cut_left(row: Encoded, length: int, special: Collection[int], kept: int = 0) -> Encoded | None:
    """The row without the beginning of its prompt, so that it has at most `length` tokens.

    A special first token (such as BOS) stays, and so do the first `kept` tokens. None if these, one
    more token of the prompt and the answer are longer.
    """
    surplus = max(0, len(row.input_ids) - length)
    first = kept or int(row.input_ids[0] in special)
    if row.prompt_tokens - surplus <= first:
        return None if surplus else row
    spans = ((max(first, a - surplus), b - surplus) for a, b in row.earlier)
    return Encoded(
        [*row.input_ids[:first], *row.input_ids[first + surplus :]],
        row.prompt_tokens - surplus,
        tuple((a, b) for a, b in spans if max(1, a) < b) if surplus else row.earlier,
    )


def _continuation(tokenizer: "PreTrainedTokenizerBase", answer: str) -> list[int]:
    """The tokens of an answer whose start would merge with the end of its prompt."""
    texts = ["\n", "\n" + answer, answer]
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    line, behind_line, alone = ids
    return behind_line[len(line) :] if behind_line[: len(line)] == line else alone


class Rows(Protocol):
    """Rows by index, from a list or a file."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Encoded: ...


class EncodedRows:
    """The rows of a memory-mapped Arrow file of `SCHEMA`."""

    def __init__(self, file: Path) -> None:
        with pa.memory_map(str(file)) as source:
            self.table = pa.ipc.open_file(source).read_all()

    def where(self, keep: Sequence[bool]) -> "EncodedRows":
        """The rows for which `keep` is true, in order."""
        filtered = copy(self)
        filtered.table = self.table.filter(pa.array(keep, pa.bool_()))
        return filtered

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __getitem__(self, index: int) -> Encoded:
        return _row(*(self.table[name][index].as_py() for name in Encoded._fields))


def encoded_rows(table: pa.Table) -> Iterator[Encoded]:
    """The rows of a table of `SCHEMA`."""
    return map(_row, *(table[name].to_pylist() for name in Encoded._fields))


def _row(ids: list[int], prompt_tokens: int, earlier: list[list[int]] | None) -> Encoded:
    return Encoded(ids, prompt_tokens, tuple((start, stop) for start, stop in earlier or ()))


def sample(num_rows: int, count: int, *, seed: int) -> list[int]:
    """A seeded random sample of `count` row indices (or all if fewer), in ascending order."""
    import torch  # Not at module level: reading a config imports this module.

    generator = torch.Generator().manual_seed(seed)
    return sorted(torch.randperm(num_rows, generator=generator)[:count].tolist())
