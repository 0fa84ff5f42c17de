"""Streams of records (values by column name) from files, each with its location."""

import codecs
import csv
import gzip
import io
import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import IO, Any, NoReturn, cast

from agcl.errors import InputError, one_line

JSON, PARQUET, CSV = "jsonl", "parquet", "csv"
FORMATS = (JSON, PARQUET, CSV)
"""Types of files by the name of their format."""
ANY = "any"
"""The format that takes each file by the end of its name."""
_ENDINGS = {
    JSON: (".jsonl", ".json", ".ndjson", ".jsonl.gz", ".json.gz", ".ndjson.gz"),
    PARQUET: (".parquet",),
    CSV: (".csv", ".tsv", ".csv.gz", ".tsv.gz"),
}


class Number(str):
    """A JSON number as it is written, to be rendered so."""


Records = Iterator[tuple[str, Mapping[str, Any]]]
"""Pairs of a location for error messages (`FILE, line 3`) and a record."""


def read(path: Path, format: str) -> Records:
    """Stream the records of a file, or of a folder's files of that format in name order.

    `format` is `jsonl` (one object per line, or a list), `json` (a list of objects, loaded whole),
    `parquet`, `csv` (a header, then text; tab-separated if the name says `.tsv`), or `any`, which
    goes by the file's name. JSON and CSV may be compressed by gzip. Numbers are text, to be
    rendered as they are written. Raises `InputError` naming file and row if something cannot be
    read.
    """
    files = [path]
    if path.is_dir():  # Archives made on macOS hold a hidden `._NAME` beside every file.
        ends = endings(format)
        files = sorted(
            f for f in path.iterdir() if f.name.lower().endswith(ends) and f.name[0] != "."
        )
    if not files:
        raise InputError(f"{path}: no *{' or *'.join(ends)} file in this folder")
    for file in files:
        if not file.is_file():
            raise InputError(f"no file {file}")
        yield from _READERS[format_of(file) if format == ANY else format](file)


def endings(format: str) -> tuple[str, ...]:
    """The ends of names that files of a format have, the usual one first."""
    if format == ANY:
        return tuple(ending for of_format in _ENDINGS.values() for ending in of_format)
    return _ENDINGS.get(format, (f".{format}",))


def format_of(file: Path) -> str:
    """The format of a file by its name; JSON where the name says nothing."""
    name = file.name.lower()
    return next((f for f, ends in _ENDINGS.items() if name.endswith(ends)), JSON)


def read_text(file: Path) -> str:
    """The content of a text file. Raises `InputError` naming it if it is missing or not UTF-8."""
    if not file.is_file():
        raise InputError(f"no file {file}")
    try:
        with _opened(file) as source:
            return source.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 text at byte {error.start}") from None
    except _UNREADABLE as error:
        raise InputError(f"{file}: not readable ({_reason(error)})") from None


def read_json(file: Path) -> Any:
    """The content of a JSON file, with numbers as text.

    Raises `InputError` naming file and line if it is invalid.
    """
    content = read_text(file)
    try:
        return _parsed(content)
    except (ValueError, RecursionError) as error:
        line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise InputError(f"{file}{line}: not JSON ({_reason(error)})") from None


def text(record: Mapping[str, Any], column: str, place: str) -> str:
    """A column's value as text: a number as it is written, a boolean as in JSON.

    Raises `InputError` naming location and column if the column is missing or not text.
    """
    if column not in record:
        raise InputError(f"{place}: no column {column!r} (columns: {', '.join(record)})")
    value = record[column]
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and math.isnan(value):
        raise InputError(f"{place}: {column!r} is NaN, a missing value, not text")
    if isinstance(value, int | float | Decimal):
        return str(value)
    if not isinstance(value, str):
        raise InputError(f"{place}: {column!r} is {kind(value)}, not text")
    if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        raise InputError(f"{place}: {column!r} contains half a character (a lone surrogate)")
    return value


def short_float(value: float | None, dtype: str) -> float | None:
    """A float32 or float16 as the shortest decimal that stands for it: 0.1, not 0.10000000149."""
    import numpy as np

    return None if value is None else float(str(np.dtype(dtype).type(value)))


def without_nulls(record: Mapping[str, Any]) -> dict[str, Any]:
    """A table's row, with the keys of nested objects that the row itself has.

    A column of objects has the keys of all rows, null where a row lacks one.
    """
    return {key: _without_nulls(value) for key, value in record.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return list(map(_without_nulls, value)) if isinstance(value, list) else value


_UNREADABLE = (OSError, EOFError, zlib.error)
"""Errors of reading a file, which may be gzip."""


def _opened(file: Path) -> IO[bytes]:
    """A file's bytes, decompressed if they start like gzip's, whatever the name."""
    with file.open("rb") as source:
        compressed = source.read(2) == b"\x1f\x8b"
    return cast(IO[bytes], gzip.open(file)) if compressed else file.open("rb")


_WANTED = "JSON lines have one object per line"


def _parsed(content: str | bytes) -> Any:
    """JSON with the literals of its numbers. Raises `ValueError`, `RecursionError`."""
    return json.loads(content, parse_float=Number, parse_int=Number, parse_constant=_no_number)


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is not valid JSON")


def json_records(file: Path) -> Records:
    """The objects of a file of JSON lines, or of one JSON list, which is loaded whole."""
    try:
        with _opened(file) as source:
            start = source.read(1024).removeprefix(codecs.BOM_UTF8).lstrip()
    except _UNREADABLE as error:
        raise InputError(f"{file}: not readable ({_reason(error)})") from None
    yield from (_json_list if start.startswith(b"[") else _json_lines)(file)


def _json_lines(file: Path) -> Records:
    try:
        with _opened(file) as lines:
            for number, line in enumerate(lines, start=1):
                place = f"{file}, line {number}"
                if not line.strip():
                    continue
                try:
                    record = _parsed(line)
                except UnicodeDecodeError:
                    raise InputError(f"{place}: not UTF-8 text") from None
                except (ValueError, RecursionError) as error:
                    hint = f"; {_WANTED}" if isinstance(error, json.JSONDecodeError) else ""
                    raise InputError(f"{place}: not JSON ({_reason(error)}){hint}") from None
                if not isinstance(record, dict):
                    raise InputError(f"{place}: {kind(record)}, not a JSON object; {_WANTED}")
                yield place, record
    except _UNREADABLE as error:
        raise InputError(f"{file}: not readable ({_reason(error)})") from None


def _json_list(file: Path) -> Records:
    records = read_json(file)
    if not isinstance(records, list):
        raise InputError(f"{file}: not a JSON list of objects")
    for number, record in enumerate(records, start=1):
        place = f"{file}, row {number}"
        if not isinstance(record, dict):
            raise InputError(f"{place}: {kind(record)}, not a JSON object")
        yield place, record


def _csv(file: Path) -> Records:
    csv.field_size_limit(2**31 - 1)  # Python's limit of 128 KiB is less than a long text.
    tabs = ".tsv" in map(str.lower, file.suffixes)
    try:
        with io.TextIOWrapper(cast(Any, _opened(file)), "utf-8-sig", newline="") as lines:
            rows = csv.reader(lines, delimiter="\t" if tabs else ",", strict=True)
            header = next(rows, [])
            if "".join(header).lstrip().startswith(("{", "[")):
                raise InputError(f"{file}: not CSV: it begins like JSON")
            if twice := next((name for name in header if name and header.count(name) > 1), None):
                raise InputError(f"{file}: the header names the column {twice!r} twice")
            for row in rows:
                place = f"{file}, line {rows.line_num}"
                if not row:
                    continue
                if len(row) != len(header):
                    raise InputError(
                        f"{place}: {len(row)} fields, but {len(header)} columns in the header"
                    )
                yield place, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise InputError(f"{file}, line {rows.line_num}: not CSV ({error})") from None
    except UnicodeDecodeError:
        raise InputError(f"{file}: not UTF-8 text") from None
    except _UNREADABLE as error:
        raise InputError(f"{file}: not readable ({_reason(error)})") from None


def _parquet(file: Path) -> Records:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as source:
            batches = source.iter_batches(batch_size=1024)
            records = (record for batch in batches for record in batch.to_pylist())
            short = {pa.float16(): "float16", pa.float32(): "float32"}
            floats = [(f.name, short[f.type]) for f in source.schema_arrow if f.type in short]
            for number, record in enumerate(records, start=1):
                record |= {name: short_float(record[name], dtype) for name, dtype in floats}
                yield f"{file}, row {number}", without_nulls(record)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not readable as Parquet ({_reason(error)})") from None


def kind(value: Any) -> str:
    """What a JSON value is, for error messages."""
    names = {dict: "an object", list: "a list", str: "text", type(None): "null"}
    names |= dict.fromkeys((Number, int, float), "a number")
    return names.get(type(value), f"a {type(value).__name__}")


def _reason(error: Exception) -> str:
    message = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
    return one_line(message, 200).removesuffix(" at")  # "Invalid control character at".


_READERS: dict[str, Callable[[Path], Records]] = {
    "jsonl": json_records,
    "json": _json_list,
    "parquet": _parquet,
    "csv": _csv,
}
