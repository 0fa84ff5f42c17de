"""Tasks from JSON Lines and Parquet files, with templates for prompt and answer."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from agcl.errors import InputError
from agcl.tasks import records
from agcl.tasks.task import TEST, TRAIN, VALIDATION, Row, Task
from agcl.tasks.template import render

SPLITS = (TRAIN, TEST, VALIDATION)


def task(
    name: str,
    files: Mapping[str, Path],
    *,
    format: str,
    prompt: str,
    answer: str,
    scorer: str = "exact_match",
) -> Task:
    """A task from one file or folder of files per split: `train`, optionally `test`, `validation`.

    `format` is `jsonl` or `parquet`; `prompt` and `answer` are templates. Without a test split the
    training rows are scored.
    """
    for split, path in files.items():
        if not path.exists():
            raise InputError(f"task {name}: no {split} file {path}")
    return Task(
        name=name,
        splits={s: partial(_rows, path, format, prompt, answer) for s, path in files.items()},
        scored={TEST: TEST} if TEST in files else {"memorization": TRAIN},
        scorer=scorer,
        memorized=TEST not in files,
    )


def _rows(path: Path, format: str, prompt: str, answer: str) -> Iterator[Row]:
    for place, record in records.read(path, format):
        yield Row(render(prompt, record, place), render(answer, record, place))
