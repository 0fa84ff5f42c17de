"""What a data file tells about itself: its format, templates and lengths, for a config to start."""

import random
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from heapq import nlargest
from itertools import filterfalse
from pathlib import Path
from typing import Any

from agcl.errors import InputError, one_line
from agcl.tasks import TEST, TRAIN, VALIDATION, Row, encode, files, is_empty, records
from agcl.tasks.encoding import encoded_rows
from agcl.tasks.layouts import LAYOUTS, task_of_records
from agcl.tasks.template import columns
from transformers import PreTrainedTokenizerBase

from pipeline.config.row_lengths import LONGEST, size

_LOOKED_AT = 1000
"""Training rows per task that are tokenized, to find their lengths: a sample of all."""
_BY_COLUMNS = (
    ("messages", {"messages"}),
    ("sharegpt", {"conversations"}),
    ("prompt_completion", {"prompt", "completion"}),
    ("alpaca", {"instruction", "output"}),
)
"""Layouts by the columns that they need; the first match counts."""
_COLUMNS = {
    "messages": {"messages", "tools"},
    "sharegpt": {"conversations", "system", "tools"},
    "prompt_completion": {"prompt", "completion", "tools"},
    "alpaca": {"instruction", "input", "output"},
}
"""All columns that a layout reads."""
_PROMPTS = ("prompt", "question", "query", "instruction", "input", "text", "sentence", "source")
_ANSWERS = ("answer", "response", "completion", "output", "label", "target")

_OF_TRAIN = re.compile(r"(?<=.)[-_]train$")
"""What a training file's stem ends in; `_test` or `-test` in its place gives the test file."""


@dataclass(frozen=True)
class Data:
    """One task's files, and what its rows look like."""

    name: str
    files: Mapping[str, str]
    """Paths as given, by split."""
    format: str
    """A layout, or the type of the files."""
    templates: Mapping[str, str]
    """`prompt` and `answer`, if the format is a type of files."""
    lengths: list[int]
    """Tokens of a sample of the training rows."""
    answers: list[int]
    """Tokens of their answers."""
    longest: int
    """Tokens of the longest row of all splits."""
    unused: str
    """Columns of the training file that are in no row, by comma; empty if there are none."""

    @property
    def said(self) -> str:
        """What was found, for the user."""
        return ", ".join(
            [f"format {self.format}", *(f"{key} {text!r}" for key, text in self.templates.items())]
        )


def look_at(path: str, tokenizer: PreTrainedTokenizerBase, *, chat: bool) -> Data:
    """Look at one task: a file, or a folder with `train` and perhaps `test` and `validation` files.

    Beside a file called `train`, its `test` and `validation` files are taken too, and beside
    `NAME.jsonl` or `NAME_train.jsonl`, for example, `NAME-test.jsonl` or `NAME_test.jsonl`. `chat`
    renders rows with the tokenizer's chat template. Raises `InputError` for what cannot be read,
    and for columns that tell no prompt and answer.
    """
    given = Path(path)
    if not given.exists():
        raise InputError(f"no file or folder {path}")
    stem = given.name.partition(".")[0]
    beside = given if given.is_dir() else given.parent
    found = files.in_folder(beside, records.ANY) if given.is_dir() else {}
    splits = {split: str(file) for split, file in found.items()}
    if not given.is_dir():
        splits["train"] = str(given)  # Without `./`, as the files beside it.
        ending, stem = given.name.removeprefix(stem), _OF_TRAIN.sub("", stem)
        for split in (TEST, VALIDATION):
            names = [f"{stem}{mark}{split}{ending}" for mark in "-_."]
            if stem == TRAIN:
                names += [split + each for each in (ending, *records.endings(records.ANY))]
            if beside_it := [file for file in map(given.with_name, names) if file.is_file()]:
                splits.setdefault(split, str(beside_it[0]))
    train = Path(splits["train"])
    first = next((record for _, record in records.read(train, records.ANY)), None)
    if first is None:
        raise InputError(f"{train}: no rows")
    layout = next((name for name, needed in _BY_COLUMNS if needed <= first.keys()), None)
    templates = {} if layout else _templates(first, train)
    settings: dict[str, Any] = {"layout": layout} if layout else dict(templates)
    if layout == "alpaca":
        settings["chat"] = chat
    read = {split: partial(records.read, Path(f), records.ANY) for split, f in splits.items()}
    filled: dict[str, None] = {}
    read[TRAIN] = partial(_noting, read[TRAIN], filled)
    sources = task_of_records("", read, **settings).splits
    looked_at = _sample(row for row in sources[TRAIN]() if not is_empty(row))
    if not looked_at:
        raise InputError(f"{train}: no row has a prompt and an answer")
    encoded = list(encoded_rows(encode(tokenizer, looked_at, chat=chat)))
    # The files may be sorted by length, and the sample lacks a few long rows.
    largest = [row for rows in sources.values() for row in nlargest(LONGEST, rows(), key=size)]
    of_largest = encode(tokenizer, filterfalse(is_empty, largest), chat=chat)
    lengths = [len(row.input_ids) for row in encoded]
    used = _COLUMNS.get(layout or "") or {c for text in templates.values() for c in columns(text)}
    return Data(
        name=beside.resolve().name if given.is_dir() or stem == "train" else stem,
        files=splits,
        format=layout or records.format_of(train),
        templates=templates,
        lengths=lengths,
        answers=[len(row.input_ids) - row.prompt_tokens for row in encoded],
        unused=one_line(", ".join(map(_shown, filter(lambda c: c not in used, filled))), 300),
        longest=max([*lengths, *(len(row.input_ids) for row in encoded_rows(of_largest))]),
    )


def _noting(read: Callable[[], records.Records], filled: dict[str, None]) -> records.Records:
    """The records, after their columns that are not blank were added to `filled`."""
    for place, record in read():
        filled.update(
            (k, None) for k, v in record.items() if v not in (None, [], {}, "") and str(v).strip()
        )
        yield place, record


def _shown(column: str) -> str:
    """A name as one word of a list, whatever characters it has."""
    return column if column.isprintable() and "," not in column else repr(column)


def _sample(rows: Iterable[Row]) -> list[Row]:
    """At most `_LOOKED_AT` rows, each as likely as any other (Vitter 1985, algorithm R)."""
    generator, kept = random.Random(0), list[Row]()
    for number, row in enumerate(rows):
        if number < _LOOKED_AT:
            kept.append(row)
        elif (place := generator.randrange(number + 1)) < _LOOKED_AT:
            kept[place] = row
    return kept


def _templates(record: Mapping[str, Any], file: Path) -> dict[str, str]:
    """Templates of prompt and answer by the names of a record's columns."""
    prompt = next((column for column in _PROMPTS if column in record), None)
    answer = next((column for column in _ANSWERS if column in record), None)
    if prompt is None or answer is None:
        raise InputError(
            f"{file}: the columns {', '.join(record)} tell no prompt and answer; write a config "
            "with templates (tasks.prompt, tasks.answer; agcl/tasks/README.md), or bring one of "
            f"the layouts {', '.join(LAYOUTS)}"
        )
    separated = str(record[answer])[:1].isspace() or str(record[prompt])[-1:].isspace()
    space = "" if separated else " "
    return {"prompt": f"{{{prompt}}}", "answer": f"{space}{{{answer}}}"}
