"""Tasks from JSON-lines files: one object a line with a prompt and an answer."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from agcl.errors import InputError
from agcl.tasks.task import TEST, TRAIN, Row, Task


def task(name: str, train: Path, test: Path | None, *, prompt_key: str, answer_key: str) -> Task:
    """A task of one or two files. Without test rows the training rows are scored."""
    files = {TRAIN: train, **({TEST: test} if test else {})}
    for split, file in files.items():
        if not file.is_file():
            raise InputError(f"task {name}: no {split} file {file}")
    return Task(
        name=name,
        splits={s: partial(_rows, file, prompt_key, answer_key) for s, file in files.items()},
        scored={TEST: TEST} if test else {"memorization": TRAIN},
    )


def _rows(file: Path, prompt_key: str, answer_key: str) -> Iterator[Row]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except UnicodeDecodeError:
                raise InputError(f"{file}, line {number}: not UTF-8 text") from None
            except ValueError as error:  # Also a number of too many digits.
                reason = error.msg if isinstance(error, json.JSONDecodeError) else error
                raise InputError(f"{file}, line {number}: not JSON ({reason})") from None
            if not isinstance(record, dict):
                raise InputError(f"{file}, line {number}: not a JSON object")
            for key in (prompt_key, answer_key):
                text = record.get(key)
                if not isinstance(text, str) or not text.strip():
                    raise InputError(f"{file}, line {number}: no text under {key!r}")
                if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
                    raise InputError(f"{file}, line {number}: half a character under {key!r}")
            yield Row(record[prompt_key], record[answer_key])
