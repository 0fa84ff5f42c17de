"""Storage on an object store (`s3://`, `gs://`): a mirror of what this machine's cache has whole.

There is no rename there, so a manifest decides. An artifact's files go to
`<storage>/stages/<artifact>/<attempt>/`; `<storage>/stages/<artifact>/manifest.json`, written last,
names the attempt, and without it there is no artifact. The attempt is the hash of all contents:
two that upload at once never mix files, and an interrupted upload goes on with the files it lacks.
"""

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from agcl.errors import InputError

from pipeline import artifact
from pipeline.artifact import MANIFEST, CorruptArtifact
from pipeline.secrets import masked

CACHE = "AGCL_CACHE"
"""Environment variable: the folder with a copy of each object store, on this machine's disk."""
_PAUSES = (1.0, 4.0, 16.0)
"""Seconds before a request is sent again, beyond the retries of pyarrow itself."""
_HOPELESS = re.compile("ACCESS_DENIED|NO_SUCH_BUCKET|INVALID_|SIGNATURE|UNAUTHORIZED|EXPIRED")
_CHUNK, _STREAMS = 16 * 2**20, 8
"""Bytes of a request, and requests at a time."""
_PASSING = (".part", ".lock", ".checkpoint")
"""How names of files end that are no results."""
_SOME = ".some"
"""How the folder with only some of an artifact's files ends."""
T = TypeVar("T")


class StoreFailed(OSError):
    """The object store could not be read or written. The message is one line that names it."""


def cache_of(uri: str) -> Path:
    """The folder on this machine that mirrors a storage URI."""
    root = Path(os.environ.get(CACHE, "~/.cache/agcl")).expanduser().absolute()
    return root / hashlib.sha256(uri.encode()).hexdigest()[:12]


def split(uri: str) -> tuple[str, Path]:
    """The storage URI that a run's folder is in, and that folder on this machine.

    Raises `InputError` where it is in no storage.
    """
    address, question, query = uri.partition("?")
    folder = address.rstrip("/")
    storage = folder.rpartition("/")[0]
    while not storage.endswith("/"):
        whole = storage + question + query
        check(whole)
        if _info(whole, "stages").type:
            return whole, cache_of(whole) / folder.removeprefix(f"{storage}/")
        storage = storage.rpartition("/")[0]
    raise InputError(f"{address}: no storage of runs and artifacts above it")


def place_of(uri: str, path: Path) -> str:
    """The URI of what the cache has under a path, to be shown."""
    return f"{uri.partition('?')[0]}/{_relative(uri, path)}"


@cache
def check(uri: str) -> None:
    """See, once, that the store can be read. Raises `InputError`."""
    try:
        store, root = _opened(uri)
        found = store.get_file_info(_everything(root, recursive=False))
        if not found and store.type_name in ("s3", "gcs"):
            bucket = root.partition("/")[0]
            if not store.get_file_info(bucket).type:
                raise InputError(f"storage: there is no bucket {bucket}")
    except (OSError, ValueError, NotImplementedError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"storage: {_said(uri, error)}") from None


def check_writable(uri: str) -> None:
    """Write a few bytes beside the artifacts. Raises `InputError`."""
    try:
        _write(uri, ".writable", b"agcl")
    except OSError as error:
        raise InputError(f"storage: {_said(uri, error)}") from None


def read_manifest(uri: str, folder: Path) -> dict[str, Any] | None:
    """The manifest of an artifact that is whole on the store; None where there is none.

    Raises `CorruptArtifact`, `StoreFailed`.
    """
    try:
        return _manifest(uri, _relative(uri, folder))
    except FileNotFoundError:
        return None


@cache
def _manifest(uri: str, name: str) -> dict[str, Any]:
    """Remembered once it is there, since nothing changes it then."""
    place = f"{uri.partition('?')[0]}/{name}"
    manifest = artifact.parse_manifest(_read(uri, f"{name}/{MANIFEST}"), place)
    if "attempt" not in manifest:
        raise CorruptArtifact(artifact.corrupt(place, f"{MANIFEST} lacks its attempt"))
    return manifest


def is_complete(uri: str, folder: Path, expected: str) -> bool:
    """Whether the store has a whole artifact of this fingerprint; raises as `read_manifest`."""
    manifest = read_manifest(uri, folder)
    if manifest and manifest["fingerprint"] != expected:
        why = "its fingerprint is another"
        raise CorruptArtifact(artifact.corrupt(place_of(uri, folder), why))
    return manifest is not None


def push(uri: str, folder: Path) -> None:
    """Upload a finished artifact, its manifest last. Raises `StoreFailed`."""
    manifest = artifact.read_manifest(folder)
    assert manifest is not None, folder
    attempt = artifact.fingerprint(manifest["files"])[:16]
    name = _relative(uri, folder)
    there = _listed(uri, f"{name}/{attempt}")
    missing = [
        file for file, entry in manifest["files"].items() if there.get(file) != entry["bytes"]
    ]
    _in_parallel(lambda file: _upload(uri, folder / file, f"{name}/{attempt}/{file}"), missing)
    text = json.dumps({**manifest, "attempt": attempt}, indent=1, ensure_ascii=False)
    _write(uri, f"{name}/{MANIFEST}", text.encode())


def fetch(uri: str, folder: Path, files: Collection[str] | None = None) -> Path:
    """Download an artifact, unless it is here. One process does, the others on its machine wait.

    Gives its folder; with `files` only those are downloaded, into a folder beside it. Raises
    `CorruptArtifact` where a file is not what its manifest says, `StoreFailed`.
    """
    if folder.exists():
        return folder
    target = folder if files is None else folder.with_name(folder.name + _SOME)
    with artifact.claimed(target):
        if folder.exists():
            return folder
        manifest = read_manifest(uri, folder)
        if manifest is None:
            raise CorruptArtifact(artifact.corrupt(place_of(uri, folder), f"it has no {MANIFEST}"))
        part = target.with_name(target.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        try:
            for file, entry in manifest["files"].items():
                if files is not None and file not in files:
                    continue
                name = f"{_relative(uri, folder)}/{manifest['attempt']}/{file}"
                if _download(uri, name, _inside(part, file)) != entry["sha256"]:
                    why = f"{file} is not what was written"
                    raise CorruptArtifact(artifact.corrupt(place_of(uri, folder), why))
            if files is None:
                artifact.write_json(part / MANIFEST, manifest)
            shutil.rmtree(target, ignore_errors=True)  # Some files, of an earlier time.
            part.replace(target)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return target


def attempt_of(uri: str, folder: Path) -> str:
    """The URI of the files of an artifact that is whole on the store."""
    return f"{place_of(uri, folder)}/{_manifest(uri, _relative(uri, folder))['attempt']}"


def read_file(uri: str, folder: Path, file: str) -> bytes | None:
    """One file of an artifact, from here or from the store; None where it has no such file.

    Raises `CorruptArtifact`, `StoreFailed`.
    """
    if folder.exists():
        return (folder / file).read_bytes() if (folder / file).is_file() else None
    manifest = read_manifest(uri, folder)
    if manifest is None or file not in manifest["files"]:
        return None
    try:
        content = _read(uri, f"{_relative(uri, folder)}/{manifest['attempt']}/{file}")
    except FileNotFoundError:
        content = b""
    if hashlib.sha256(content).hexdigest() != manifest["files"][file]["sha256"]:
        why = f"{file} is not what was written"
        raise CorruptArtifact(artifact.corrupt(place_of(uri, folder), why))
    return content


def push_results(uri: str, folder: Path) -> None:
    """Upload the files of a run's folder, and of those below: not links, locks or scratch folders.

    Raises `StoreFailed`.
    """
    _in_parallel(lambda file: _upload(uri, file, _relative(uri, file)), list(_results(folder)))


def _results(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.is_symlink() or path.name.startswith(".") or path.name.endswith(_PASSING):
            continue
        if path.is_dir():
            yield from _results(path)
        else:
            yield path


@contextmanager
def results(storage: Path | str, folder: Path) -> Iterator[None]:
    """Work on a run's folder: with an object store, take its files from there, and leave them there
    at the end, also after an exception. Raises `StoreFailed`."""
    if isinstance(storage, Path):
        yield
        return
    pull_results(storage, folder)
    try:
        yield
    except BaseException:
        with suppress(OSError):  # What happened says more.
            push_results(storage, folder)
        raise
    push_results(storage, folder)


def pull_results(uri: str, folder: Path) -> None:
    """Take the files of a run's folder from the store: they replace those here.

    Raises `StoreFailed`.
    """
    at = _relative(uri, folder)

    def pull(file: str) -> None:
        target = _inside(folder, file)
        aside = target.with_name(target.name + ".part")
        _download(uri, f"{at}/{file}", aside)
        aside.replace(target)

    _in_parallel(pull, list(_listed(uri, at)))


def push_file(uri: str, file: Path) -> None:
    """Upload one file. Raises `StoreFailed`."""
    _upload(uri, file, _relative(uri, file))


def pull_file(uri: str, file: Path) -> None:
    """Download one file, if the store has it and it is not here. Raises `StoreFailed`."""
    if file.exists() or not modified(uri, file):
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(file.name + ".part")
    _download(uri, _relative(uri, file), aside)
    aside.replace(file)


def modified(uri: str, file: Path) -> int:
    """When a file was uploaded, in nanoseconds since 1970; 0 where the store has none."""
    return _info(uri, _relative(uri, file)).mtime_ns or 0


def remove_file(uri: str, file: Path) -> None:
    """Delete one file, if the store has it. Raises `StoreFailed`."""
    if modified(uri, file):
        store, root = _opened(uri)
        _trying(uri, lambda: store.delete_file(f"{root}/{_relative(uri, file)}"))


@cache
def _opened(uri: str) -> tuple[Any, str]:
    """The file system of a storage URI, and the storage's path in it."""
    from pyarrow import fs  # Takes a while, and local storage does without.

    store, root = fs.FileSystem.from_uri(uri)
    return store, root.rstrip("/")


def _relative(uri: str, path: Path) -> str:
    return path.relative_to(cache_of(uri)).as_posix()


def _inside(folder: Path, name: str) -> Path:
    """A file's path in a folder, which is made. A store's names are not ours to trust."""
    file = folder / name
    if ".." in file.parts or file == folder or not file.is_relative_to(folder):
        raise CorruptArtifact(f"storage: refused a file named {name!r}")
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


def _info(uri: str, name: str) -> Any:
    store, root = _opened(uri)
    return _trying(uri, lambda: store.get_file_info(f"{root}/{name}"))


def _everything(path: str, *, recursive: bool = True) -> Any:
    from pyarrow import fs

    return fs.FileSelector(path, recursive=recursive, allow_not_found=True)


def _listed(uri: str, name: str) -> dict[str, int]:
    """Sizes of the files below a name, by their paths from there."""
    store, root = _opened(uri)
    at = f"{root}/{name}"
    found = _trying(uri, lambda: store.get_file_info(_everything(at)))
    return {info.path[len(at) + 1 :]: info.size for info in found if info.is_file}


def _read(uri: str, name: str) -> bytes:
    store, root = _opened(uri)

    def read() -> bytes:
        with store.open_input_stream(f"{root}/{name}") as stream:
            return bytes(stream.read())

    return _trying(uri, read)


def _write(uri: str, name: str, content: bytes) -> None:
    """Write a small file, whole or not at all."""
    store, root = _opened(uri)

    def write() -> None:
        path = f"{root}/{name}"
        aside = f"{path}.part" if _is_file_system(store) else path
        with _sink(store, aside) as sink:
            sink.write(content)
        if aside != path:
            store.move(aside, path)

    _trying(uri, write)


def _upload(uri: str, file: Path, name: str) -> None:
    store, root = _opened(uri)

    def upload() -> None:
        with file.open("rb") as source, _sink(store, f"{root}/{name}") as sink:
            shutil.copyfileobj(source, sink, _CHUNK)

    _trying(uri, upload)


def _sink(store: Any, path: str) -> Any:
    if _is_file_system(store):
        store.create_dir(path.rpartition("/")[0])
    return store.open_output_stream(path)


def _is_file_system(store: Any) -> bool:
    """Whether it has folders to be made, and shows a file while it is written."""
    return store.type_name in ("local", "hdfs")


def _download(uri: str, name: str, target: Path) -> str:
    """Download a file, several chunks at a time; its SHA-256."""
    store, root = _opened(uri)

    def download() -> str:
        digest = hashlib.sha256()
        with (
            store.open_input_file(f"{root}/{name}") as source,
            target.open("wb") as sink,
            ThreadPoolExecutor(_STREAMS) as pool,
        ):
            size = source.size()
            for start in range(0, size, _STREAMS * _CHUNK):
                end = min(size, start + _STREAMS * _CHUNK)
                at = range(start, end, _CHUNK)
                for data in pool.map(lambda i: source.read_at(_CHUNK, i), at):
                    digest.update(data)
                    sink.write(data)
        return digest.hexdigest()

    try:
        return _trying(uri, download)
    except FileNotFoundError:
        return ""  # No file has this hash.


def _in_parallel(do: Callable[[str], None] | Callable[[Path], None], files: list[Any]) -> None:
    with ThreadPoolExecutor(_STREAMS) as pool:
        list(pool.map(do, files))


def _trying(uri: str, request: Callable[[], T]) -> T:
    """Do it, and again after a while where the store fails. Raises `StoreFailed`.

    Errors with a number are the system's own and come again: no such file, no space left.
    """
    for pause in (*_PAUSES, None):
        try:
            return request()
        except OSError as error:
            if error.errno is not None:
                raise
            if pause is None or _HOPELESS.search(str(error)):
                raise StoreFailed(f"storage: {_said(uri, error)}") from None
            time.sleep(pause)
    raise AssertionError


def _said(uri: str, error: Exception) -> str:
    text = " ".join(str(error).split()).removeprefix("storage: ")
    return masked(f"{uri.partition('?')[0]}: {text}")
