"""Requests to an object store at a URI, with retries and one-line errors.

File names are relative to the URI. `bucket.py` decides what is stored under which name.
"""

import re
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from agcl.errors import InputError, one_line

from pipeline.secrets import masked

_PAUSES = (1.0, 4.0, 16.0)
"""Seconds before each retry, in addition to pyarrow's own retries."""
_PERMANENT = re.compile("ACCESS_DENIED|NO_SUCH_BUCKET|INVALID_|SIGNATURE|UNAUTHORIZED|EXPIRED")
_REQUESTS = 8
"""Number of concurrent copies."""
T = TypeVar("T")


class StoreFailed(OSError):
    """The object store could not be read or written. The message is one line that names it."""


@cache
def check(uri: str) -> None:
    """Check, once per process, that the store can be read. Raises `InputError`."""
    try:
        store, root = _opened(uri)
        is_empty = not store.get_file_info(_below(root, recursive=False))
    except (OSError, ValueError, NotImplementedError) as error:
        raise InputError(in_one_line(uri, error)) from None
    if is_empty and not _has_folders(store):  # A missing bucket looks like an empty one.
        bucket = root.partition("/")[0]
        with suppress(OSError):  # Permission to list a prefix may not extend to the bucket.
            if not store.get_file_info(bucket).type:
                raise InputError(f"storage: there is no bucket {bucket}")


def info(uri: str, name: str) -> Any:
    """Type, size and time of a file or folder. The type is falsy if it does not exist."""
    store, root = _opened(uri)
    return _retried(uri, lambda: store.get_file_info(f"{root}/{name}"))


def sizes(uri: str, folder: str) -> dict[str, int]:
    """Size in bytes of every file below a folder, by relative path."""
    store, root = _opened(uri)
    at = f"{root}/{folder}"
    found = _retried(uri, lambda: store.get_file_info(_below(at)))
    return {each.path[len(at) + 1 :]: each.size for each in found if each.is_file}


def read(uri: str, name: str) -> bytes:
    """The content of a small file. Raises `FileNotFoundError`, `StoreFailed`."""
    store, root = _opened(uri)

    def request() -> bytes:
        with store.open_input_stream(f"{root}/{name}") as stream:
            return bytes(stream.read())

    return _retried(uri, request)


def write(uri: str, name: str, content: bytes) -> None:
    """Write a small file atomically. Raises `StoreFailed`."""
    store, root = _opened(uri)
    path = f"{root}/{name}"
    # File systems show a file while it is being written; object stores do not.
    aside = f"{path}.part" if _has_folders(store) else path

    def request() -> None:
        _make_parent(store, path)
        with store.open_output_stream(aside) as sink:
            sink.write(content)
        if aside != path:
            store.move(aside, path)

    _retried(uri, request)


def upload(uri: str, file: Path, name: str) -> None:
    """Copy a file to the store. Raises `StoreFailed`."""
    from pyarrow import fs

    store, root = _opened(uri)

    def request() -> None:
        _make_parent(store, f"{root}/{name}")
        fs.copy_files(str(file), f"{root}/{name}", fs.LocalFileSystem(), store)

    _retried(uri, request)


def download(uri: str, name: str, file: Path) -> None:
    """Copy a file from the store. Raises `FileNotFoundError`, `StoreFailed`."""
    from pyarrow import fs

    store, root = _opened(uri)
    _retried(uri, lambda: fs.copy_files(f"{root}/{name}", str(file), store, fs.LocalFileSystem()))


def remove(uri: str, name: str) -> None:
    """Delete an existing file. Raises `StoreFailed`."""
    store, root = _opened(uri)
    _retried(uri, lambda: store.delete_file(f"{root}/{name}"))


def for_each(items: Iterable[T], do: Callable[[T], Any]) -> None:
    """Call `do` for all items in several threads."""
    with ThreadPoolExecutor(_REQUESTS) as pool:
        list(pool.map(do, items))


def in_one_line(uri: str, error: Exception) -> str:
    """An error as one line for the user: the store and the reason, without credentials."""
    if isinstance(error, StoreFailed):
        return str(error)
    return masked(f"storage: {uri.partition('?')[0]}: {one_line(error)}")


@cache
def _opened(uri: str) -> tuple[Any, str]:
    """The file system of a URI, and its path there."""
    from pyarrow import fs  # Slow to import, and not needed for a local storage.

    store, root = fs.FileSystem.from_uri(uri)
    return store, root.rstrip("/")


def _below(path: str, *, recursive: bool = True) -> Any:
    from pyarrow import fs

    return fs.FileSelector(path, recursive=recursive, allow_not_found=True)


def _make_parent(store: Any, path: str) -> None:
    if _has_folders(store):
        store.create_dir(path.rpartition("/")[0])


def _has_folders(store: Any) -> bool:
    return store.type_name in ("local", "hdfs")


def _retried(uri: str, request: Callable[[], T]) -> T:
    """The result of a request, retried with pauses while the store fails. Raises `StoreFailed`.

    Errors with an errno come from the operating system (no such file, no space left) and would
    recur, so they are raised unchanged.
    """
    for pause in (*_PAUSES, None):
        try:
            return request()
        except OSError as error:
            if error.errno is not None:
                raise
            if pause is None or _PERMANENT.search(str(error)):
                raise StoreFailed(in_one_line(uri, error)) from None
            time.sleep(pause)
    raise AssertionError
