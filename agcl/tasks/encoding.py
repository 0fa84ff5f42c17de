"""Prompt and answer to token ids, and token ids on disk, memory-mapped."""

from collections.abc import Iterable, Sequence
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

import pyarrow as pa

from agcl.tasks.task import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("prompt_tokens", pa.int32()),
        ("prompt", pa.string()),
        ("answer", pa.string()),
    ]
)


class Encoded(NamedTuple):
    """One row as tokens: prompt, then answer, then the end-of-sequence token."""

    input_ids: list[int]
    prompt_tokens: int


def encode(
    tokenizer: "PreTrainedTokenizerBase", rows: Iterable[Row], *, chat: bool = False
) -> pa.Table:
    """Tokenize rows into a table of `SCHEMA`.

    Prompt and answer are tokenized apart, so that the prompt's tokens at training are those at
    generation; special tokens (a leading BOS, say) stand where the tokenizer puts them before the
    prompt, and the end-of-sequence token closes the answer. Loss counts on answer and end. With
    `chat` the prompt is a user's message in the tokenizer's chat template, which brings the special
    tokens and the separation with it, so that the answer begins without white space.
    """
    rows = list(rows)
    if chat:
        rows = [Row(_as_message(tokenizer, row.prompt), row.answer.lstrip()) for row in rows]
    prompts = (
        tokenizer([row.prompt for row in rows], add_special_tokens=not chat)["input_ids"]
        if rows
        else []
    )
    answers = (
        tokenizer([row.answer for row in rows], add_special_tokens=False)["input_ids"]
        if rows
        else []
    )
    # Some tokenizers close every text with EOS; the answer must follow the prompt directly.
    end = tokenizer.eos_token_id
    prompts = [ids[:-1] if ids and ids[-1] == end else ids for ids in prompts]
    return pa.table(
        {
            "input_ids": [[*p, *a, end] for p, a in zip(prompts, answers, strict=True)],
            "prompt_tokens": [len(p) for p in prompts],
            "prompt": [row.prompt for row in rows],
            "answer": [row.answer for row in rows],
        },
        schema=SCHEMA,
    )


def _as_message(tokenizer: "PreTrainedTokenizerBase", prompt: str) -> str:
    return cast(
        str,
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        ),
    )


class Rows(Protocol):
    """Rows by index: a list, or a file of them."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Encoded: ...


class EncodedRows:
    """The rows of an Arrow file of `SCHEMA`, read by index from a memory map."""

    def __init__(self, file: Path) -> None:
        with pa.memory_map(str(file)) as source:
            self.table = pa.ipc.open_file(source).read_all()

    def where(self, keep: Sequence[bool]) -> "EncodedRows":
        """The rows that are kept, in their order."""
        kept = copy(self)
        kept.table = self.table.filter(pa.array(keep, pa.bool_()))
        return kept

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __getitem__(self, index: int) -> Encoded:
        return Encoded(
            self.table["input_ids"][index].as_py(), self.table["prompt_tokens"][index].as_py()
        )


class MixedRows:
    """Some rows of several sources, as one."""

    def __init__(self, parts: Sequence[tuple[Rows, Sequence[int]]]) -> None:
        """Every part is rows with the indices of those to take."""
        self.places = [(rows, index) for rows, indices in parts for index in indices]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Encoded:
        rows, inner = self.places[index]
        return rows[inner]


def sample(num_rows: int, count: int, *, seed: int) -> list[int]:
    """`count` of that many row indices, ascending, drawn by the seed; all if there are fewer."""
    import torch  # Here, as whoever reads a config imports this module.

    generator = torch.Generator().manual_seed(seed)
    return sorted(torch.randperm(num_rows, generator=generator)[:count].tolist())
