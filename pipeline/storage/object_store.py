"""Object stores by their URI (`s3://bucket/prefix`, `gs://...`): requests, and what can go wrong.

Files have names below the URI. Whatever `pyarrow.fs` opens will do. What lies where is said in
`mirror.py`.
"""

import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from agcl.errors import InputError

from pipeline.secrets import masked

CACHE = "AGCL_CACHE"
"""Environment variable: the folder with a copy of each object store, on this machine's disk."""
_PAUSES = (1.0, 4.0, 16.0)
"""Seconds before a request is sent again, beyond the retries of pyarrow itself."""
_HOPELESS = re.compile("ACCESS_DENIED|NO_SUCH_BUCKET|INVALID_|SIGNATURE|UNAUTHORIZED|EXPIRED")
_CHUNK, _STREAMS = 16 * 2**20, 8
"""Bytes of a request, and requests at a time."""
T = TypeVar("T")


class StoreFailed(OSError):
    """The object store could not be read or written. The message is one line that names it."""


def cache_of(uri: str) -> Path:
    """The folder on this machine that mirrors a storage URI."""
    root = Path(os.environ.get(CACHE, "~/.cache/agcl")).expanduser().absolute()
    return root / hashlib.sha256(uri.encode()).hexdigest()[:12]


def name_of(uri: str, path: Path) -> str:
    """The name on the store of what is under a path in its cache."""
    return path.relative_to(cache_of(uri)).as_posix()


def place_of(storage: Path | str, path: Path) -> str:
    """Where what is under a path is kept, to be shown: the path, or the URI on an object store."""
    if isinstance(storage, Path):
        return str(path)
    return f"{storage.partition('?')[0]}/{name_of(storage, path)}"


@cache
def check(uri: str) -> None:
    """See, once, that the store can be read. Raises `InputError`."""
    try:
        store, root = _opened(uri)
        is_empty = not store.get_file_info(_below(root, recursive=False))
    except (OSError, ValueError, NotImplementedError) as error:
        raise InputError(_said(uri, error)) from None
    if is_empty and not _is_file_system(store):  # As a bucket looks that is not there.
        bucket = root.partition("/")[0]
        with suppress(OSError):  # Who may list a prefix need not be allowed to ask for its bucket.
            if not store.get_file_info(bucket).type:
                raise InputError(f"storage: there is no bucket {bucket}")


def check_writable(uri: str) -> None:
    """Write a few bytes. Raises `InputError`."""
    try:
        write(uri, ".writable", b"agcl")
    except OSError as error:
        raise InputError(_said(uri, error)) from None


def info(uri: str, name: str) -> Any:
    """Type, size and time of a file or folder; the type is false where there is none."""
    store, root = _opened(uri)
    return _trying(uri, lambda: store.get_file_info(f"{root}/{name}"))


def sizes(uri: str, folder: str) -> dict[str, int]:
    """Of the files below a name, by their paths from there."""
    store, root = _opened(uri)
    at = f"{root}/{folder}"
    found = _trying(uri, lambda: store.get_file_info(_below(at)))
    return {each.path[len(at) + 1 :]: each.size for each in found if each.is_file}


def read(uri: str, name: str) -> bytes:
    """What a small file holds. Raises `FileNotFoundError`, `StoreFailed`."""
    store, root = _opened(uri)

    def request() -> bytes:
        with store.open_input_stream(f"{root}/{name}") as stream:
            return bytes(stream.read())

    return _trying(uri, request)


def write(uri: str, name: str, content: bytes) -> None:
    """Write a small file, whole or not at all. Raises `StoreFailed`."""
    store, root = _opened(uri)
    path = f"{root}/{name}"
    aside = f"{path}.part" if _is_file_system(store) else path

    def request() -> None:
        with _sink(store, aside) as sink:
            sink.write(content)
        if aside != path:
            store.move(aside, path)

    _trying(uri, request)


def upload(uri: str, file: Path, name: str) -> None:
    """Copy a file there. Raises `StoreFailed`."""
    store, root = _opened(uri)

    def request() -> None:
        with file.open("rb") as source, _sink(store, f"{root}/{name}") as sink:
            shutil.copyfileobj(source, sink, _CHUNK)

    _trying(uri, request)


def download(uri: str, name: str, target: Path) -> str:
    """Copy a file here, several chunks at a time; its SHA-256, and no text where there is none."""
    store, root = _opened(uri)

    def request() -> str:
        digest = hashlib.sha256()
        with (
            store.open_input_file(f"{root}/{name}") as source,
            target.open("wb") as sink,
            ThreadPoolExecutor(_STREAMS) as pool,
        ):
            size = source.size()
            for start in range(0, size, _STREAMS * _CHUNK):
                places = range(start, min(size, start + _STREAMS * _CHUNK), _CHUNK)
                for data in pool.map(lambda place: source.read_at(_CHUNK, place), places):
                    digest.update(data)
                    sink.write(data)
        return digest.hexdigest()

    try:
        return _trying(uri, request)
    except FileNotFoundError:
        return ""


def remove(uri: str, name: str) -> None:
    """Delete a file that is there. Raises `StoreFailed`."""
    store, root = _opened(uri)
    _trying(uri, lambda: store.delete_file(f"{root}/{name}"))


def for_each(items: Iterable[T], do: Callable[[T], Any]) -> None:
    """Do it for all of them, several at a time."""
    with ThreadPoolExecutor(_STREAMS) as pool:
        list(pool.map(do, items))


@cache
def _opened(uri: str) -> tuple[Any, str]:
    """The file system of a storage URI, and the storage's path in it."""
    from pyarrow import fs  # Takes a while, and local storage does without.

    store, root = fs.FileSystem.from_uri(uri)
    return store, root.rstrip("/")


def _below(path: str, *, recursive: bool = True) -> Any:
    from pyarrow import fs

    return fs.FileSelector(path, recursive=recursive, allow_not_found=True)


def _sink(store: Any, path: str) -> Any:
    if _is_file_system(store):
        store.create_dir(path.rpartition("/")[0])
    return store.open_output_stream(path)


def _is_file_system(store: Any) -> bool:
    """Whether it has folders to be made, and shows a file while it is written."""
    return store.type_name in ("local", "hdfs")


def _trying(uri: str, request: Callable[[], T]) -> T:
    """Do it, and again after a while where the store fails. Raises `StoreFailed`.

    Errors with a number are the system's own and would come again: no such file, no space left.
    """
    for pause in (*_PAUSES, None):
        try:
            return request()
        except OSError as error:
            if error.errno is not None:
                raise
            if pause is None or _HOPELESS.search(str(error)):
                raise StoreFailed(_said(uri, error)) from None
            time.sleep(pause)
    raise AssertionError


def _said(uri: str, error: Exception) -> str:
    if isinstance(error, StoreFailed):
        return str(error)
    text = " ".join(str(error).split())
    return masked(f"storage: {uri.partition('?')[0]}: {text}")
