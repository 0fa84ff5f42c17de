"""Tasks from JSON, Parquet and CSV files."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from agcl.errors import InputError
from agcl.tasks import records
from agcl.tasks.layouts import task_of_records
from agcl.tasks.task import TEST, TRAIN, VALIDATION, Task

SPLITS = (TRAIN, TEST, VALIDATION)


def task(name: str, files: Mapping[str, Path], *, format: str, **rendering: Any) -> Task:
    """A task from one file or folder of files per split: `train`, optionally `test`, `validation`.

    `format` is that of `records.read`; `rendering` is that of `task_of_records`.
    """
    for split, path in files.items():
        if not path.exists():
            raise InputError(f"task {name}: no {split} file {path}")
    splits = {split: partial(records.read, path, format) for split, path in files.items()}
    return task_of_records(name, splits, **rendering)


def in_folder(folder: Path, format: str) -> dict[str, Path]:
    """A folder's files by split: `train.jsonl` and so on, or folders of such a name.

    Raises `InputError` if two files are called like the same split.
    """
    found = {}
    for split in SPLITS:
        names = [split + ending for ending in records.endings(format)]
        there = [folder / name for name in names if (folder / name).exists()]
        if len(there) > 1 and (format == records.ANY or there[0].name != names[0]):
            raise InputError(
                f"{folder}: both {there[0].name} and {there[1].name}; name one of them"
            )
        if there:
            found[split] = there[0]
    return {TRAIN: folder / f"{TRAIN}{records.endings(format)[0]}", **found}
