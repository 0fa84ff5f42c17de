"""Tokenizing prompts and answers, and memory-mapped files of token ids."""

from collections.abc import Iterable, Sequence
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

import pyarrow as pa

from agcl.tasks.choice import position
from agcl.tasks.task import Row, is_empty

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("prompt_tokens", pa.int32()),
        ("prompt", pa.string()),
        ("answer", pa.string()),
        ("position", pa.float64()),  # `choice.position`: what a share of the scored rows goes by.
    ]
)


class Encoded(NamedTuple):
    """One tokenized row: prompt, answer, end-of-sequence token."""

    input_ids: list[int]
    prompt_tokens: int


def encode(
    tokenizer: "PreTrainedTokenizerBase", rows: Iterable[Row], *, chat: bool = False
) -> pa.Table:
    """Tokenize rows into a table of `SCHEMA`.

    The tokenizer's special tokens (such as BOS) are added to the prompt, and an end-of-sequence
    token to the answer. With `chat` the prompt becomes a user message in the tokenizer's chat
    template, which provides special tokens and separators; the answer's leading whitespace is
    removed.
    """
    rows = list(rows)
    positions = [position(row, seed=0) for row in rows]
    if chat:
        rows = [
            row if is_empty(row) else Row(_as_message(tokenizer, row.prompt), row.answer.lstrip())
            for row in rows
        ]
    prompts, answers = [], []
    if rows:
        # Tokenized separately, so that the prompt has the same tokens in training and generation.
        prompts = tokenizer([r.prompt for r in rows], add_special_tokens=not chat)["input_ids"]
        answers = tokenizer([r.answer for r in rows], add_special_tokens=False)["input_ids"]
    # Some tokenizers append EOS to every text; the answer must follow the prompt directly.
    end = tokenizer.eos_token_id
    prompts = [ids[:-1] if ids and ids[-1] == end else ids for ids in prompts]
    return pa.table(
        {
            "input_ids": [[*p, *a, end] for p, a in zip(prompts, answers, strict=True)],
            "prompt_tokens": [len(p) for p in prompts],
            "prompt": [row.prompt for row in rows],
            "answer": [row.answer for row in rows],
            "position": positions,
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
        return Encoded(
            self.table["input_ids"][index].as_py(), self.table["prompt_tokens"][index].as_py()
        )


def sample(num_rows: int, count: int, *, seed: int) -> list[int]:
    """A seeded random sample of `count` row indices (or all if fewer), in ascending order."""
    import torch  # Not at module level: reading a config imports this module.

    generator = torch.Generator().manual_seed(seed)
    return sorted(torch.randperm(num_rows, generator=generator)[:count].tolist())
