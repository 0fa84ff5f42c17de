"""Tasks from Hugging Face `datasets`: a local folder or a name on the Hub."""

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from agcl.errors import InputError, one_line
from agcl.tasks import records
from agcl.tasks.layouts import task_of_records
from agcl.tasks.records import Records
from agcl.tasks.task import TEST, Task

_PLAIN = re.compile(r"\.(csv|tsv|json|jsonl|ndjson)(\.gz)?$")
"""Names of files that need no extraction."""
Splits = Mapping[str, Callable[[], Records]]
"""By name: starts one pass over a split's records."""


def task(
    name: str,
    path: str,
    splits: Mapping[str, str],
    *,
    subset: str | None,
    revision: str | None,
    **rendering: Any,
) -> Task:
    """A task from a dataset; `splits` maps `train`, optionally `test`, `validation` to its splits.

    `path` is a folder (of data files, or written by `save_to_disk`) or a name on the Hub, `subset`
    its configuration. Class labels are replaced by their names. The columns of CSV and JSON files
    are text, as written, unless the folder declares their types. `rendering` is that of
    `task_of_records`. Raises `InputError` if `path` is a file.
    """
    if Path(path).is_file():
        raise InputError(
            f"{path}: a file; format huggingface takes the folder that holds it, "
            "formats jsonl and parquet take a file"
        )
    read = {
        ours: partial(_records, path, subset, revision, theirs) for ours, theirs in splits.items()
    }
    return task_of_records(name, read, **rendering)


def _records(path: str, subset: str | None, revision: str | None, split: str) -> Records:
    """Stream a split, in the notation of `datasets`. Never runs a dataset's script."""
    import datasets
    from datasets.exceptions import DatasetsError
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError

    datasets.disable_progress_bars()
    try:
        if Path(path).is_dir():
            # The cache of `datasets` goes by path and time of a file, not by its content.
            with TemporaryDirectory() as cache:
                yield from _part(_splits(Path(path), subset, cache), split)
        else:
            loaded = datasets.load_dataset(path, subset, split=split, revision=revision)
            yield from _typed(f"{path}, {split}", loaded)
    except InputError:
        raise
    except (ValueError, TypeError, RuntimeError, OSError, DatasetsError) as error:
        absent = isinstance(error, ConnectionError | FileNotFoundError | HFValidationError)
        if absent and not Path(path).is_dir():
            offline = constants.is_offline_mode()
            remedy = "HF_HUB_OFFLINE is set" if offline else "check the name, the network, HF_TOKEN"
            raise InputError(
                f"{path}: no such folder, and not available from the Hub ({_reason(error)}); "
                f"{remedy}"
            ) from None
        raise InputError(f"{path}, {split}: {_reason(error)}") from None


def _splits(folder: Path, subset: str | None, cache: str) -> Splits:
    import datasets

    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        saved = datasets.load_from_disk(folder)
        if isinstance(saved, datasets.Dataset):
            saved = {str(saved.split or "train"): saved}
    else:
        builder = datasets.load_dataset_builder(str(folder), subset, cache_dir=cache)
        if reader := _text_reader(builder):
            files = builder.config.data_files
            return {str(split): partial(_of_files, reader, files[split]) for split in files}
        saved = builder.as_streaming_dataset()
    return {str(s): partial(_typed, f"{folder}, {s}", rows) for s, rows in saved.items()}


def _text_reader(builder: Any) -> Callable[[Path], Records] | None:
    """A reader of CSV or JSON files as text; None if the folder declares types or has other files.

    `datasets` would guess undeclared types: 007 would become 7, and 0.00001 would become 1e-05;
    None, NA and dates would not be text.
    """
    names = [name for files in (builder.config.data_files or {}).values() for name in files]
    if builder.info.features or not all(map(_PLAIN.search, names)):
        return None
    match builder.name:
        case "csv":
            return partial(_csv, builder.config.pd_read_csv_kwargs)
        case "json" if builder.config.field is None and builder.config.encoding == "utf-8":
            return records.json_records
    return None


def _of_files(reader: Callable[[Path], Records], files: Iterable[str]) -> Records:
    for file in files:
        yield from reader(Path(file))


def _csv(options: Mapping[str, Any], file: Path) -> Records:
    import pandas as pd

    options = {**options, "dtype": str, "keep_default_na": False}
    try:
        with pd.read_csv(file, iterator=True, **options) as blocks:
            rows = (row for block in blocks for row in block.to_dict("records"))
            for number, row in enumerate(rows, start=1):
                yield f"{file}, row {number}", row
    except ValueError as error:
        raise InputError(f"{file}: {_reason(error)}") from None


def _typed(place: str, dataset: Any) -> Records:
    from datasets import ClassLabel

    convert: dict[str, Callable[[Any], Any]] = {}
    for column, feature in (dataset.features or {}).items():
        if isinstance(feature, ClassLabel):
            convert[column] = partial(_label, feature)
        elif getattr(feature, "dtype", None) in ("float16", "float32"):
            convert[column] = partial(records.short_float, dtype=feature.dtype)
    for number, record in enumerate(map(dict, dataset), start=1):
        record |= {column: change(record[column]) for column, change in convert.items()}
        yield f"{place} row {number}", records.without_nulls(record)


def _label(feature: Any, value: int | None) -> str | None:
    return None if value is None or value < 0 else str(feature.int2str(value))


def _part(splits: Splits, wanted: str) -> Records:
    """The records of a split, slice or sum, such as `train[:8]+test`."""
    from datasets import ReadInstruction

    if wanted == "all":
        wanted = "+".join(splits)
    # Only shares and places counted from the end need the number of rows.
    counted = re.search("[%-]", wanted)
    lengths = {
        name: sum(1 for _ in rows()) if counted and name in wanted else sys.maxsize
        for name, rows in splits.items()
    }
    try:
        parts = ReadInstruction.from_spec(wanted).to_absolute(lengths)
    except ValueError as error:
        hint = "; test: null scores the training rows" if wanted == TEST else ""
        raise ValueError(f"{str(error).rstrip('.')}{hint}") from None
    for part in parts:
        yield from islice(splits[part.splitname](), part.from_, part.to)


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return one_line(error, 300) or type(error).__name__
