"""Tasks from Hugging Face `datasets`: a local folder or a name on the Hub."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from agcl.errors import InputError
from agcl.tasks.records import Records
from agcl.tasks.task import Task
from agcl.tasks.template import task_of_records


def task(
    name: str,
    path: str,
    splits: Mapping[str, str],
    *,
    subset: str | None,
    revision: str | None,
    **rendering: str,
) -> Task:
    """A task from a dataset; `splits` maps `train`, optionally `test`, `validation` to its splits.

    `path` is a folder (of data files, or written by `save_to_disk`) or a name on the Hub, `subset`
    its configuration. Class labels are replaced by their names. `rendering` is that of
    `task_of_records`.
    """
    records = {
        ours: partial(_records, path, subset, revision, theirs) for ours, theirs in splits.items()
    }
    return task_of_records(name, records, **rendering)


def _records(path: str, subset: str | None, revision: str | None, split: str) -> Records:
    from datasets import ClassLabel

    dataset = _load(path, subset, revision, split)
    names: dict[str, Callable[[int], str]] = {
        column: feature.int2str
        for column, feature in dataset.features.items()
        if isinstance(feature, ClassLabel)
    }
    try:
        for number, record in enumerate(map(dict, dataset), start=1):
            for column, name in names.items():
                try:
                    record[column] = name(record[column])
                except (ValueError, TypeError):  # -1 and None mean no label.
                    record[column] = None
            yield f"{path}, {split} row {number}", record
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}, {split}: {_reason(error)}") from None


def _load(path: str, subset: str | None, revision: str | None, split: str) -> Any:
    """The split, memory-mapped by `datasets`. Never runs a dataset's script."""
    import datasets
    from huggingface_hub.errors import HFValidationError

    datasets.disable_progress_bars()
    try:
        if (Path(path) / "dataset_dict.json").is_file():
            return datasets.load_from_disk(path)[split]
        if (Path(path) / "state.json").is_file():
            return datasets.load_from_disk(path)
        return datasets.load_dataset(path, subset, split=split, revision=revision)
    except KeyError:
        raise InputError(f"{path}: no split {split!r}") from None
    except (ConnectionError, FileNotFoundError, HFValidationError) as error:
        raise InputError(
            f"{path}: no such folder, and not available from the Hub ({_reason(error)}); "
            "set HF_HUB_OFFLINE=0 to allow downloads"
        ) from None
    except (ValueError, RuntimeError, OSError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"{path}, {split}: {_reason(error)}") from None


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300] or type(error).__name__
