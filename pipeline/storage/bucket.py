"""A storage in a bucket, with a cache on each machine's disk.

A bucket cannot rename, so the manifest commits an artifact. Files go to
`<uri>/stages/<artifact>/<attempt>/`, and then `<uri>/stages/<artifact>/manifest.json`, which names
the attempt; without it there is no artifact. The attempt is a hash of all contents, so concurrent
uploads never mix files, and an interrupted upload resumes with the missing files.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agcl.errors import InputError
from typing_extensions import override

from pipeline.storage import artifact, object_store
from pipeline.storage.artifact import MANIFEST, CorruptArtifact
from pipeline.storage.storage import STAGES, Storage

if TYPE_CHECKING:
    from agcl.files.checkpoint import Checkpoint

CACHE = "AGCL_CACHE"
"""Environment variable: the folder for caches on this machine, `~/.cache/agcl` by default."""
_TEMPORARY = (".part", ".lock")
"""Suffixes of files that are not results."""


@dataclass(frozen=True)
class Bucket(Storage):
    """An object store (`s3://bucket/prefix`, `gs://...`), or anything else that `pyarrow.fs` opens.

    Methods that access the store raise `StoreFailed`.
    """

    uri: str
    shared = False
    tracking_uri = None

    def __str__(self) -> str:
        return self.uri

    @property
    @override
    def root(self) -> Path:
        caches = Path(os.environ.get(CACHE, "~/.cache/agcl")).expanduser().absolute()
        return caches / hashlib.sha256(self.uri.encode()).hexdigest()[:12]

    @override
    def place(self, path: Path) -> str:
        return f"{self.uri.partition('?')[0]}/{self._name(path)}"

    @override
    def check(self) -> None:
        given = os.environ.get(CACHE, "/")
        if not Path(given).expanduser().is_absolute():  # Workers have other working folders.
            raise InputError(f"{CACHE}: must be an absolute path, not {given}")
        super().check()
        object_store.check(self.uri)

    @override
    def check_writable(self) -> None:
        super().check_writable()
        try:
            object_store.write(self.uri, ".writable", b"agcl")
        except OSError as error:
            raise InputError(object_store.in_one_line(self.uri, error)) from None

    @override
    def is_complete(self, folder: Path, fingerprint: str) -> bool:
        manifest = self.manifest(folder)
        if manifest and manifest["fingerprint"] != fingerprint:
            raise self._corrupt(folder, "it has a different fingerprint")
        return manifest is not None

    @override
    def publish_left_over(self, folder: Path, fingerprint: str) -> bool:
        if self.is_complete(folder, fingerprint):
            return True
        if not artifact.is_complete(folder, fingerprint):
            return False
        artifact.verify(folder)
        self.publish(folder)
        return True

    @override
    def manifest(self, folder: Path) -> dict[str, Any] | None:
        try:
            return _manifest(self, folder)
        except FileNotFoundError:
            return None

    @override
    def read(self, folder: Path, name: str) -> bytes | None:
        if folder.exists():
            return (folder / name).read_bytes() if (folder / name).is_file() else None
        manifest = self.manifest(folder)
        if manifest is None or name not in manifest["files"]:
            return None
        content = b""
        with suppress(FileNotFoundError):
            content = object_store.read(self.uri, self._name(folder, manifest["attempt"], name))
        if hashlib.sha256(content).hexdigest() != manifest["files"][name]["sha256"]:
            raise self._corrupt(folder, f"{name} is not what was written")
        return content

    @override
    def fetch(self, folder: Path, names: Collection[str] | None = None) -> Path:
        """Download an artifact. Other processes on this machine wait for the one that does.

        With `names`, only those files are downloaded, into a folder beside the artifact's. Raises
        `CorruptArtifact` if a file does not match the manifest.
        """
        if folder.exists() or folder.parent != self.root / STAGES:
            return folder
        suffix = "" if names is None else f".{artifact.fingerprint(sorted(names))[:8]}"
        target = folder.with_name(folder.name + suffix)
        with artifact.claimed(target):
            if not target.exists():
                self._download(folder, target, names)
        return target

    def _download(self, folder: Path, target: Path, names: Collection[str] | None) -> None:
        manifest = self.manifest(folder)
        if manifest is None:
            raise self._corrupt(folder, f"it has no {MANIFEST}")
        files = {n: e for n, e in manifest["files"].items() if names is None or n in names}
        part = target.with_name(target.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        try:
            for name, entry in files.items():
                file = _inside(part, name)
                with suppress(FileNotFoundError):
                    object_store.download(
                        self.uri, self._name(folder, manifest["attempt"], name), file
                    )
                if not file.exists() or artifact.file_hash(file) != entry["sha256"]:
                    raise self._corrupt(folder, f"{name} is not what was written")
            artifact.write_json(part / MANIFEST, {**manifest, "files": files})
            part.replace(target)
        finally:
            shutil.rmtree(part, ignore_errors=True)

    @override
    def publish(self, folder: Path) -> None:
        """Upload an artifact, manifest last."""
        manifest = artifact.read_manifest(folder)
        assert manifest is not None, folder
        attempt = artifact.fingerprint(manifest["files"])[:16]
        uploaded = object_store.sizes(self.uri, self._name(folder, attempt))
        files = manifest["files"].items()
        missing = [name for name, entry in files if uploaded.get(name) != entry["bytes"]]
        object_store.for_each(
            missing,
            lambda name: object_store.upload(
                self.uri, folder / name, self._name(folder, attempt, name)
            ),
        )
        text = json.dumps({**manifest, "attempt": attempt}, indent=1, ensure_ascii=False)
        object_store.write(self.uri, self._name(folder, MANIFEST), text.encode())

    @override
    def uri_of_files(self, folder: Path) -> str:
        return f"{self.place(folder)}/{_manifest(self, folder)['attempt']}"

    @override
    def checkpoint(self, folder: Path, fingerprint: str, seconds: float) -> "Checkpoint":
        """A checkpoint that survives the loss of its machine.

        A failed upload does not end training; an older checkpoint, or none, remains in the bucket.
        A file in the cache that another machine has replaced in the bucket since is deleted.
        """
        from agcl.files.checkpoint import Checkpoint  # Imports torch.

        file = artifact.checkpoint_of(folder)
        mark = _mark(file)

        def set_mark(copied: Path) -> None:
            if copied == file and file.exists():  # Its parts name the write that they belong to.
                mark.write_text(str(self._modified(file)))

        def download(wanted: Path) -> None:
            self.refresh(wanted)
            set_mark(wanted)

        def upload(written: Path) -> None:
            self._push(written)
            set_mark(written)

        stored = self._modified(file) if file.exists() else 0
        if stored and not (mark.exists() and mark.read_text() == str(stored)):
            file.unlink(missing_ok=True)  # By another rank on this machine.
        return Checkpoint(
            file, fingerprint, seconds, download=download, upload=upload, delete=self._delete
        )

    @override
    def checkpoint_time(self, folder: Path) -> int:
        return self._modified(artifact.checkpoint_of(folder))

    @override
    @contextmanager
    def results(self, folder: Path) -> Iterator[None]:
        names = object_store.sizes(self.uri, self._name(folder))
        object_store.for_each(names, lambda name: self._pull(_inside(folder, name)))
        if not names:  # New, or deleted by the user: what the cache has must not come back.
            for file in [*_results(folder)]:
                file.unlink(missing_ok=True)
        try:
            yield
        except BaseException:
            with suppress(OSError):  # The first error is the informative one.
                self.save_results(folder)
            raise
        self.save_results(folder)

    @override
    def save_results(self, folder: Path) -> None:
        """Upload a run's files recursively, without links, locks and temporary files."""
        object_store.for_each(_results(folder), self._push)

    @override
    def refresh(self, file: Path) -> None:
        if self._modified(file):
            self._pull(file)
        else:
            file.unlink(missing_ok=True)

    def _delete(self, file: Path) -> None:
        """Delete a checkpoint's file here and in the bucket."""
        file.unlink(missing_ok=True)
        _mark(file).unlink(missing_ok=True)
        if self._modified(file):
            object_store.remove(self.uri, self._name(file))

    @override
    def delete_folder(self, folder: Path) -> None:
        super().delete_folder(folder)
        names = object_store.sizes(self.uri, self._name(folder))
        object_store.for_each(
            names, lambda name: object_store.remove(self.uri, self._name(folder, name))
        )

    def _push(self, file: Path) -> None:
        object_store.upload(self.uri, file, self._name(file))

    def _pull(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_name(file.name + ".part")
        object_store.download(self.uri, self._name(file), aside)
        aside.replace(file)

    def _modified(self, file: Path) -> int:
        """Upload time of a file in nanoseconds since 1970; 0 if there is no file."""
        return object_store.info(self.uri, self._name(file)).mtime_ns or 0

    def _name(self, path: Path, *below: str) -> str:
        """The name in the bucket of a path in the cache."""
        return "/".join([path.relative_to(self.root).as_posix(), *below])

    def _corrupt(self, folder: Path, why: str) -> CorruptArtifact:
        return CorruptArtifact(artifact.corrupt(self.place(folder), why))


def _mark(file: Path) -> Path:
    """The file that says which upload the checkpoint in the cache is; removed with it."""
    return file.with_name(file.name + ".stored")


@cache
def _manifest(bucket: Bucket, folder: Path) -> dict[str, Any]:
    """Cached once it exists, since it never changes. Raises `FileNotFoundError`."""
    content = object_store.read(bucket.uri, bucket._name(folder, MANIFEST))
    manifest = artifact.parse_manifest(content, bucket.place(folder))
    if "attempt" not in manifest:
        raise bucket._corrupt(folder, f"{MANIFEST} lacks its attempt")
    return manifest


def bucket_of(uri: str) -> tuple[Bucket, Path]:
    """The bucket that contains a run, given the run's URI, and the run's folder on this machine.

    Raises `InputError` if the URI is not inside a storage.
    """
    address, question, query = uri.partition("?")
    folder = address.rstrip("/")
    above = folder.rpartition("/")[0]
    while not above.endswith("/"):
        bucket = Bucket(above + question + query)
        bucket.check()
        if object_store.info(bucket.uri, STAGES).type:
            return bucket, bucket.root / folder.removeprefix(f"{above}/")
        above = above.rpartition("/")[0]
    raise InputError(f"{address}: not inside a storage of runs and artifacts")


def _results(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.is_symlink() or path.name.startswith(".") or path.name.endswith(_TEMPORARY):
            continue
        if path.is_dir():
            yield from _results(path)
        else:
            yield path


def _inside(folder: Path, name: str) -> Path:
    """A file's path in a folder, with its parents made. Names in a bucket are not trusted."""
    file = folder / name
    if ".." in file.parts or file == folder or not file.is_relative_to(folder):
        raise CorruptArtifact(f"storage: refused a file named {name!r}")
    file.parent.mkdir(parents=True, exist_ok=True)
    return file
