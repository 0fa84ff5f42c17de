"""Artifacts that tests put in an object store, and machines that see only the store."""

from pathlib import Path

import pytest

from pipeline.storage import Bucket, artifact, bucket, object_store

FILES = {"a.txt": b"one", "deep/b é.bin": bytes(range(256)) * 4000, "empty": b""}
FINGERPRINT = "f00d"


def move_to(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The view of another machine: only the store."""
    monkeypatch.setenv("AGCL_CACHE", str(machine))
    bucket._manifest.cache_clear()
    object_store.check.cache_clear()


def folder_of(uri: str) -> Path:
    """The artifact's folder in this machine's cache."""
    return Bucket(uri).root / "stages" / "toy-f00d"


def make(folder: Path, files: dict[str, bytes] = FILES) -> Path:
    with artifact.writing(folder, {"fingerprint": FINGERPRINT}) as out:
        for name, data in files.items():
            (out / name).parent.mkdir(exist_ok=True)
            (out / name).write_bytes(data)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    found = {f.relative_to(folder).as_posix(): f for f in folder.rglob("*") if f.is_file()}
    return {name: file.read_bytes() for name, file in found.items() if name != "manifest.json"}
