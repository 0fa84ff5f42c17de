"""Base text: what the base model's importance is measured on, written by itself or given."""

import json
import random
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
from agcl.model import models
from agcl.scoring.own_text import own_texts, start_token
from agcl.tasks import SCHEMA, TRAIN, Encoded
from transformers import PreTrainedTokenizerBase

from pipeline.config.sources import text_files
from pipeline.stages.context import Context
from pipeline.stages.files import TEXTS, rows_file

_BYTES_PER_TOKEN = 16
"""Read per token that is asked for: more than tokens of common languages have."""


def write_own_text(
    config: Mapping[str, Any], inputs: Mapping[str, Path], out_dir: Path, context: Context
) -> None:
    """Generate texts with `model`; write `texts.jsonl` to read, and rows to attribute."""
    with context.borrowed_model(inputs, config) as model:
        tokenizer = models.load_tokenizer(inputs["model"])
        texts = own_texts(
            model,
            tokenizer,
            samples=config["samples"],
            tokens=config["tokens"],
            seed=config["seed"],
            precision=config["precision"],
            log=lambda done: context.log({"texts": done, "of_texts": config["samples"]}, done),
        )
    if context.is_rank_zero:
        _write(texts, tokenizer, out_dir)


def cut_text(
    config: Mapping[str, Any], inputs: Mapping[str, Path], out_dir: Path, context: Context
) -> None:
    """Cut pieces out of the file or folder `text`; write the same files as `write_own_text`."""
    tokenizer = models.load_tokenizer(inputs["tokenizer"])
    has_config = (inputs["tokenizer"] / "config.json").exists()  # The built-in tokenizer has none.
    model_config = models.config_of(inputs["tokenizer"]) if has_config else None
    pieces = pieces_of(
        inputs["text"],
        samples=config["samples"],
        size=config["tokens"] * _BYTES_PER_TOKEN,
        seed=config["seed"],
    )
    first = start_token(tokenizer, model_config)
    ids = (_ids(tokenizer, piece) for piece in pieces)
    texts = [Encoded([first, *each[: config["tokens"]]], 1) for each in ids if each]
    if not texts:
        raise ValueError(f"base.text: nothing but white space was drawn from {inputs['text']}")
    _write(texts, tokenizer, out_dir)


def pieces_of(path: Path, *, samples: int, size: int, seed: int) -> Iterator[str]:
    """Pieces of at most `size` bytes of UTF-8 text, evenly spread, each at a random word.

    Reads only the pieces. They may overlap, since the caller uses only the beginning of each.
    Yields fewer than `samples` if the text is short or a piece is only white space.
    """
    files = text_files(path)
    starts = list(accumulate((file.stat().st_size for file in files), initial=0))
    total = starts.pop()
    samples = max(1, min(samples, 4 * total // size))
    generator = random.Random(seed)
    for number in range(samples):
        place = int((number + generator.random()) * total / samples)
        index = bisect_right(starts, place) - 1
        with files[index].open("rb") as stream:
            # Not so close to the end that little is left.
            room = max(0, files[index].stat().st_size - size)
            start = stream.seek(min(place - starts[index], room))
            text = stream.read(size).decode("utf-8", errors="ignore")
        # As Python reads a text file that may begin with a byte order mark.
        text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
        if words := text.split(maxsplit=1):
            yield words[-1] if start else text


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


def _write(texts: Sequence[Encoded], tokenizer: PreTrainedTokenizerBase, out_dir: Path) -> None:
    parts = [(ids[:count], ids[count:]) for ids, count, _ in texts]
    prompts, answers = (tokenizer.batch_decode(list(each)) for each in zip(*parts, strict=True))
    table = pa.table(
        {
            "input_ids": [text.input_ids for text in texts],
            "prompt_tokens": [text.prompt_tokens for text in texts],
            "earlier": [None] * len(texts),
            "prompt": prompts,
            "answer": answers,
            "position": [0.0] * len(texts),
            "references": [None] * len(texts),
            "kept": [0] * len(texts),
            "question": [None] * len(texts),
        },
        schema=SCHEMA,
    )
    with (
        pa.OSFile(str(out_dir / rows_file(TRAIN)), "wb") as sink,
        pa.ipc.new_file(sink, SCHEMA) as writer,
    ):
        writer.write_table(table)
    with (out_dir / TEXTS).open("w", encoding="utf-8") as lines:
        for prompt, text in zip(prompts, answers, strict=True):
            lines.write(json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False) + "\n")
