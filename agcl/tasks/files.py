"""Tasks from JSON Lines and Parquet files, with templates for prompt and answer."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from agcl.errors import InputError
from agcl.tasks import records
from agcl.tasks.task import TEST, TRAIN, VALIDATION, Task
from agcl.tasks.template import task_of_records

SPLITS = (TRAIN, TEST, VALIDATION)


def task(name: str, files: Mapping[str, Path], *, format: str, **rendering: str) -> Task:
    """A task from one file or folder of files per split: `train`, optionally `test`, `validation`.

    `format` is `jsonl` or `parquet`; `rendering` is that of `task_of_records`.
    """
    for split, path in files.items():
        if not path.exists():
            raise InputError(f"task {name}: no {split} file {path}")
    splits = {split: partial(records.read, path, format) for split, path in files.items()}
    return task_of_records(name, splits, **rendering)
