"""Streams of records (values by column name) from files, each with its location."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from agcl.errors import InputError

Records = Iterator[tuple[str, Mapping[str, Any]]]
"""Pairs of a location for error messages (`FILE, line 3`) and a record."""


def read(path: Path, format: str) -> Records:
    """Stream the records of a file, or of a folder's files with that extension in name order.

    `format` is `jsonl` (one object per line), `json` (one list of objects, loaded whole) or
    `parquet`. Raises `InputError` naming file and row if something cannot be read.
    """
    reader = _READERS[format]
    files = sorted(path.glob(f"*.{format}")) if path.is_dir() else [path]
    if not files:
        raise InputError(f"{path}: no *.{format} file in this folder")
    for file in files:
        if not file.is_file():
            raise InputError(f"no file {file}")
        yield from reader(file)


def read_text(file: Path) -> str:
    """The content of a text file. Raises `InputError` naming it if it is missing or not UTF-8."""
    if not file.is_file():
        raise InputError(f"no file {file}")
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 text at byte {error.start}") from None


def read_json(file: Path) -> Any:
    """The content of a JSON file. Raises `InputError` naming file and line if it is invalid."""
    content = read_text(file)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise InputError(f"{file}{line}: not JSON ({_reason(error)})") from None


def text(record: Mapping[str, Any], column: str, place: str) -> str:
    """A column's value as text. Numbers are converted.

    Raises `InputError` naming location and column if the column is missing or not text.
    """
    if column not in record:
        raise InputError(f"{place}: no column {column!r} (columns: {', '.join(record)})")
    value = record[column]
    if isinstance(value, bool):
        return str(value).lower()  # As in JSON.
    if isinstance(value, int | float):
        return str(value)
    if not isinstance(value, str):
        raise InputError(f"{place}: {column!r} is {_kind(value)}, not text")
    if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        raise InputError(f"{place}: {column!r} contains half a character (a lone surrogate)")
    return value


def _json_lines(file: Path) -> Records:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            place = f"{file}, line {number}"
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except UnicodeDecodeError:
                raise InputError(f"{place}: not UTF-8 text") from None
            except (ValueError, RecursionError) as error:  # Includes numbers with too many digits.
                raise InputError(f"{place}: not JSON ({_reason(error)})") from None
            yield place, _object(record, place)


def _json_list(file: Path) -> Records:
    records = read_json(file)
    if not isinstance(records, list):
        raise InputError(f"{file}: not a JSON list of objects")
    for number, record in enumerate(records, start=1):
        place = f"{file}, row {number}"
        yield place, _object(record, place)


def _parquet(file: Path) -> Records:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as source:
            batches = source.iter_batches(batch_size=1024)
            records = (record for batch in batches for record in batch.to_pylist())
            for number, record in enumerate(records, start=1):
                yield f"{file}, row {number}", record
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not readable as Parquet ({_reason(error)})") from None


def _object(record: Any, place: str) -> Mapping[str, Any]:
    if not isinstance(record, dict):
        raise InputError(f"{place}: {_kind(record)}, not a JSON object")
    return record


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", type(None): "null"}
    return names.get(type(value), f"a {type(value).__name__}")


def _reason(error: Exception) -> str:
    message = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
    return " ".join(message.split())[:200]


_READERS: dict[str, Callable[[Path], Records]] = {
    "jsonl": _json_lines,
    "json": _json_list,
    "parquet": _parquet,
}
