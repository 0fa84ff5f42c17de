"""Artifacts: folders that are either complete or absent.

A stage writes into `<folder>.part`, which is renamed to `<folder>` once it has a `manifest.json`.
The manifest records what the folder was made from and the hash of every file.
"""

import fcntl
import glob
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import agcl
from agcl.errors import InputError

MANIFEST = "manifest.json"
_PACKAGES = ("torch", "transformers", "ray", "pyarrow", "mlflow")


class CorruptArtifact(InputError):
    """A finished artifact whose files do not match its manifest."""


def fingerprint(what: Any) -> str:
    """SHA-256 of a JSON value with sorted keys."""
    text = json.dumps(what, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def file_hash(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def content_hash(path: Path, patterns: Sequence[str] = ("*",)) -> str:
    """SHA-256 of a file, or of the names and contents of a folder's files that match a pattern.

    Hidden files do not count, such as an editor's; folders behind links do. Cached per process,
    because a search asks for its base model's hash in every trial: a file is read again only if its
    size or ctime changed (mtime can be set back).
    """
    if path.is_file():
        return _hash_of(path)
    # Like what reads the data, and unlike `Path.glob`: follows links, leaves out hidden files.
    of = (glob.glob(each, root_dir=path, recursive=True) for each in patterns)  # noqa: PTH207
    names = set(chain(*of))
    return fingerprint({name: _hash_of(path / name) for name in names if (path / name).is_file()})


def _hash_of(file: Path) -> str:
    status = file.stat()
    return _hash_as_of(file, status.st_size, status.st_ctime_ns)


@cache
def _hash_as_of(file: Path, size: int, changed: int) -> str:
    return file_hash(file)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished artifact, or None. Raises `CorruptArtifact` if it is invalid."""
    try:
        return parse_manifest((folder / MANIFEST).read_bytes(), folder)
    except (FileNotFoundError, NotADirectoryError):
        return None


def parse_manifest(content: bytes, place: Path | str) -> dict[str, Any]:
    """The manifest in a file's content. Raises `CorruptArtifact`, which names the place."""
    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CorruptArtifact(corrupt(place, f"{MANIFEST} is not JSON ({error})")) from None
    if not isinstance(manifest, dict) or not {"fingerprint", "files"} <= manifest.keys():
        raise CorruptArtifact(corrupt(place, f"{MANIFEST} lacks its fingerprint or files"))
    files = manifest["files"]
    for entry in files.values() if isinstance(files, dict) else [files]:
        if not isinstance(entry, dict) or not {"bytes", "sha256"} <= entry.keys():
            raise CorruptArtifact(corrupt(place, f"{MANIFEST} lacks a file's size and hash"))
    return manifest


def is_complete(folder: Path, expected: str) -> bool:
    """Whether the folder is a finished artifact with this fingerprint and all its files.

    Compares file sizes; `verify` compares contents. Raises `CorruptArtifact`.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        if folder.exists():
            raise CorruptArtifact(corrupt(folder, f"it has no {MANIFEST}"))
        return False
    if manifest["fingerprint"] != expected:
        raise CorruptArtifact(corrupt(folder, "it has a different fingerprint"))
    for name, entry in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            raise CorruptArtifact(corrupt(folder, f"{name} is missing"))
        if file.stat().st_size != entry["bytes"]:
            raise CorruptArtifact(corrupt(folder, f"{name} has a different size than was written"))
    return True


def verify(folder: Path, only: Collection[str] | None = None) -> None:
    """Compare every file, or only the named ones, with its recorded hash.

    Raises `CorruptArtifact`, which names the file.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise CorruptArtifact(corrupt(folder, f"it has no {MANIFEST}"))
    for name, entry in manifest["files"].items():
        if only is not None and name not in only:
            continue
        file = folder / name
        if not file.is_file() or file_hash(file) != entry["sha256"]:
            raise CorruptArtifact(corrupt(folder, f"{name} is not what was written"))


@contextmanager
def claimed(path: Path, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the exclusive right to make an artifact, or another file or folder.

    Waits for another holder, after calling `on_wait`. The lock is on `<path>.lock`, and the system
    releases it when the process ends, however it ends.
    """
    file = _lock_of(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), file.stat()):
                break
        os.close(descriptor)  # The last holder has removed the file: lock a new one.
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        os.close(descriptor)


def folder_name(stage_name: str) -> str:
    """A stage's name as a folder name."""
    return re.sub(r"[^\w.-]", "_", stage_name.replace("/", "-"))


def checkpoint_of(folder: Path) -> Path:
    """The training checkpoint of an unfinished artifact, beside its folder."""
    return folder.with_name(folder.name + ".checkpoint")


def remove_leftovers(path: Path) -> None:
    """Remove the lock and checkpoint that a killed process left beside a finished artifact."""
    for file in path.parent.glob(f"{checkpoint_of(path).name}*"):  # Also a partly written one.
        file.unlink(missing_ok=True)
    if _lock_of(path).exists():
        with claimed(path):
            pass


def _lock_of(path: Path) -> Path:
    return path.with_name(path.name + ".lock")


@contextmanager
def writing(folder: Path, record: Mapping[str, Any]) -> Iterator[Path]:
    """Yield an empty `<folder>.part`; on normal exit, add the manifest and rename it.

    `record` must contain the fingerprint. After an exception, the part is removed.
    """
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    started, clock = time.time(), time.monotonic()
    try:
        yield part
        files = sorted(f for f in part.rglob("*") if f.is_file())
        for file in files:  # safetensors writes files that only their owner can read.
            file.chmod(part.stat().st_mode & 0o666)
        manifest = {
            **record,
            **provenance(),
            "started": started,
            "seconds": round(time.monotonic() - clock, 3),  # The system clock may be changed.
            "files": {
                str(f.relative_to(part)): {"bytes": f.stat().st_size, "sha256": file_hash(f)}
                for f in files
            },
        }
        write_json(part / MANIFEST, manifest)
        for file in files:
            _sync(file)
        part.replace(folder)
        _sync(folder.parent)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def write_json(file: Path, value: Any) -> None:
    """Write a JSON file atomically: to a temporary file, flushed to disk, then renamed."""
    write_text(file, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_text(file: Path, text: str) -> None:
    """Write a text file atomically: to a temporary file, flushed to disk, then renamed."""
    aside = file.with_name(file.name + ".part")
    try:
        aside.write_text(text, encoding="utf-8")
        _sync(aside)
        aside.replace(file)
    except OSError as error:
        error.filename = error.filename or str(file)  # Unnamed if the disk is full.
        raise


@cache
def provenance() -> dict[str, Any]:
    """Git commit of the code, and versions of Python and packages."""
    root = Path(agcl.__file__).parent.parent
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    said = ""
    if (root / ".git").exists():  # Else git would name a repository around site-packages.
        said = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "git": said or "not a git checkout",
        "versions": {
            "agcl": agcl.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in _PACKAGES},
        },
    }


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def corrupt(place: Path | str, why: str) -> str:
    """One line that says which artifact is damaged and what to do about it."""
    return f"artifact {place} is corrupt: {why}; delete that folder to compute it again"
