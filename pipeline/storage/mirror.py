"""Storage on an object store: a mirror of what is whole in the cache on some machine's disk.

There is no rename there, so a manifest decides. An artifact's files go to
`<storage>/stages/<artifact>/<attempt>/`; `<storage>/stages/<artifact>/manifest.json`, written last,
names the attempt, and without it there is no artifact. The attempt is the hash of all contents:
two that upload at once never mix files, and an interrupted upload goes on with the files it lacks.

Everywhere `uri` is that of the storage, and paths are in its cache on this machine. Functions that
ask the store raise `StoreFailed`.
"""

import hashlib
import json
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from agcl.errors import InputError

from pipeline.storage import artifact, object_store
from pipeline.storage.artifact import MANIFEST, CorruptArtifact
from pipeline.storage.object_store import cache_of, name_of, place_of

_PASSING = (".part", ".lock")
"""How names of files end that are no results."""


def read_manifest(uri: str, folder: Path) -> dict[str, Any] | None:
    """The manifest of an artifact that is whole on the store; None where there is none.

    Raises `CorruptArtifact`.
    """
    try:
        return _manifest(uri, folder)
    except FileNotFoundError:
        return None


@cache
def _manifest(uri: str, folder: Path) -> dict[str, Any]:
    """Remembered once it is there, since nothing changes it then."""
    content = object_store.read(uri, f"{name_of(uri, folder)}/{MANIFEST}")
    manifest = artifact.parse_manifest(content, place_of(uri, folder))
    if "attempt" not in manifest:
        raise _corrupt(uri, folder, f"{MANIFEST} lacks its attempt")
    return manifest


def is_complete(uri: str, folder: Path, expected: str) -> bool:
    """Whether the store has a whole artifact of this fingerprint. Raises `CorruptArtifact`."""
    manifest = read_manifest(uri, folder)
    if manifest and manifest["fingerprint"] != expected:
        raise _corrupt(uri, folder, "its fingerprint is another")
    return manifest is not None


def push(uri: str, folder: Path) -> None:
    """Upload a finished artifact, its manifest last."""
    manifest = artifact.read_manifest(folder)
    assert manifest is not None, folder
    attempt = artifact.fingerprint(manifest["files"])[:16]
    at = f"{name_of(uri, folder)}/{attempt}"
    there = object_store.sizes(uri, at)
    files = manifest["files"].items()
    missing = [name for name, entry in files if there.get(name) != entry["bytes"]]
    object_store.for_each(
        missing, lambda name: object_store.upload(uri, folder / name, f"{at}/{name}")
    )
    text = json.dumps({**manifest, "attempt": attempt}, indent=1, ensure_ascii=False)
    object_store.write(uri, f"{name_of(uri, folder)}/{MANIFEST}", text.encode())


def fetch(uri: str, folder: Path, names: Collection[str] | None = None) -> Path:
    """Download an artifact, unless it is here. One process does, the others on its machine wait.

    Gives its folder; with `names` only those files are downloaded, into a folder beside it. Raises
    `CorruptArtifact` where a file is not what its manifest says.
    """
    if folder.exists():
        return folder
    some = "" if names is None else f".{artifact.fingerprint(sorted(names))[:8]}"
    target = folder.with_name(folder.name + some)
    with artifact.claimed(target):
        if target.exists():
            return target
        manifest = read_manifest(uri, folder)
        if manifest is None:
            raise _corrupt(uri, folder, f"it has no {MANIFEST}")
        files = {n: e for n, e in manifest["files"].items() if names is None or n in names}
        part = target.with_name(target.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        try:
            for name, entry in files.items():
                key = f"{name_of(uri, folder)}/{manifest['attempt']}/{name}"
                if object_store.download(uri, key, _inside(part, name)) != entry["sha256"]:
                    raise _corrupt(uri, folder, f"{name} is not what was written")
            artifact.write_json(part / MANIFEST, {**manifest, "files": files})
            part.replace(target)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return target


def files_of(uri: str, folder: Path) -> str:
    """The URI of the files of an artifact that is whole on the store, to be shown."""
    return f"{place_of(uri, folder)}/{_manifest(uri, folder)['attempt']}"


def read(uri: str, folder: Path, name: str) -> bytes | None:
    """What a file of an artifact holds, here or on the store; None where it has no such file.

    Raises `CorruptArtifact`.
    """
    if folder.exists():
        return (folder / name).read_bytes() if (folder / name).is_file() else None
    manifest = read_manifest(uri, folder)
    if manifest is None or name not in manifest["files"]:
        return None
    content = b""
    with suppress(FileNotFoundError):
        content = object_store.read(uri, f"{name_of(uri, folder)}/{manifest['attempt']}/{name}")
    if hashlib.sha256(content).hexdigest() != manifest["files"][name]["sha256"]:
        raise _corrupt(uri, folder, f"{name} is not what was written")
    return content


@contextmanager
def results(storage: Path | str, folder: Path) -> Iterator[None]:
    """Work on a run's folder: with an object store, take its files from there, and leave them there
    at the end, also after an exception."""
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


def push_results(storage: Path | str, folder: Path) -> None:
    """With an object store, upload the files of a run's folder, and of those below: no links,
    locks or scratch folders."""
    if isinstance(storage, str):
        object_store.for_each(_results(folder), lambda file: push_file(storage, file))


def _results(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.is_symlink() or path.name.startswith(".") or path.name.endswith(_PASSING):
            continue
        if path.is_dir():
            yield from _results(path)
        else:
            yield path


def pull_results(storage: Path | str, folder: Path) -> None:
    """With an object store, take the files of a run's folder from it: they replace those here."""
    if isinstance(storage, str):
        names = object_store.sizes(storage, name_of(storage, folder))
        object_store.for_each(names, lambda name: _pull(storage, _inside(folder, name)))


def push_file(uri: str, file: Path) -> None:
    """Upload one file."""
    object_store.upload(uri, file, name_of(uri, file))


def pull_file(storage: Path | str, file: Path) -> None:
    """With an object store, make one file what it is there, or remove it where there is none."""
    if isinstance(storage, str):
        if modified(storage, file):
            _pull(storage, file)
        else:
            file.unlink(missing_ok=True)


def _pull(uri: str, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(file.name + ".part")
    object_store.download(uri, name_of(uri, file), aside)
    aside.replace(file)


def modified(uri: str, file: Path) -> int:
    """When a file was uploaded, in nanoseconds since 1970; 0 where the store has none."""
    return object_store.info(uri, name_of(uri, file)).mtime_ns or 0


def remove_file(uri: str, file: Path) -> None:
    """Delete one file, if the store has it."""
    if modified(uri, file):
        object_store.remove(uri, name_of(uri, file))


def split(uri: str) -> tuple[str, Path]:
    """Of the URI of a run's folder: that of the storage it is in, and the folder on this machine.

    Raises `InputError` where it is in no storage.
    """
    address, question, query = uri.partition("?")
    folder = address.rstrip("/")
    above = folder.rpartition("/")[0]
    while not above.endswith("/"):
        storage = above + question + query
        object_store.check(storage)
        if object_store.info(storage, "stages").type:
            return storage, cache_of(storage) / folder.removeprefix(f"{above}/")
        above = above.rpartition("/")[0]
    raise InputError(f"{address}: no storage of runs and artifacts above it")


def _inside(folder: Path, name: str) -> Path:
    """A file's path in a folder, whose own is made. A store's names are not ours to trust."""
    file = folder / name
    if ".." in file.parts or file == folder or not file.is_relative_to(folder):
        raise CorruptArtifact(f"storage: refused a file named {name!r}")
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


def _corrupt(uri: str, folder: Path, why: str) -> CorruptArtifact:
    return CorruptArtifact(artifact.corrupt(place_of(uri, folder), why))
