"""The interface of all storages, and the storage that is a plain folder.

All paths passed to or returned by a storage are on this machine, below `root`: the folder itself,
or the cache of a bucket.
"""

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from agcl.errors import InputError
from typing_extensions import override

from pipeline.storage import artifact

if TYPE_CHECKING:
    from agcl.files.checkpoint import Checkpoint

STAGES = "stages"
"""The folder of all artifacts."""
DATABASE = "mlflow.db"
"""MLflow's sqlite file in a folder."""


def default_uri(storage: Path) -> str:
    """The URI of the sqlite database in a storage folder."""
    return f"sqlite:///{storage / DATABASE}"


class Storage(ABC):
    """Stores the folders of runs and the artifacts of stages, by default all below `root`."""

    shared = True
    """Whether all nodes of the cluster see the same files below `root`."""

    @property
    @abstractmethod
    def root(self) -> Path:
        """The folder on this machine."""

    @property
    def tracking_uri(self) -> str | None:
        """MLflow's default tracking URI; None if the storage cannot hold its database."""
        return default_uri(self.root)

    def place(self, path: Path) -> str:
        """The user-facing location of a path: the path itself, or its URI in a bucket."""
        return str(path)

    def check(self) -> None:
        """Raise `InputError` if the storage cannot be read. Writes nothing."""
        existing = next(path for path in (self.root, *self.root.parents) if path.exists())
        if not existing.is_dir():
            raise InputError(f"storage: {existing} is not a folder")

    def check_writable(self) -> None:
        """Raise `InputError` if the storage cannot be made or written to. Leaves nothing behind."""
        existing = next(path for path in (self.root, *self.root.parents) if path.exists())
        if existing != self.root:
            try:
                # Not the folder itself: another first command may be making it at the same time.
                with TemporaryDirectory(prefix=".agcl-", dir=existing) as scratch:
                    (Path(scratch) / self.root.relative_to(existing)).mkdir(parents=True)
            except OSError as error:
                raise InputError(f"storage: cannot make {self.root} ({error.strerror})") from None
        for folder in (existing, existing / STAGES):
            if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
                raise InputError(f"storage: {folder} cannot be written to")

    def is_complete(self, folder: Path, fingerprint: str) -> bool:
        """Whether the artifact is complete. Raises `CorruptArtifact` if it is a different one."""
        return artifact.is_complete(folder, fingerprint)

    def publish_left_over(self, folder: Path, fingerprint: str) -> bool:
        """Finish an interrupted upload, if there is one; then like `is_complete`."""
        return self.is_complete(folder, fingerprint)

    def manifest(self, folder: Path) -> dict[str, Any] | None:
        """The manifest of a complete artifact, or None."""
        return artifact.read_manifest(folder)

    def read(self, folder: Path, name: str) -> bytes | None:
        """The content of a file in a complete artifact, or None if there is no such file."""
        return (folder / name).read_bytes() if (folder / name).is_file() else None

    def fetch(self, folder: Path, names: Collection[str] | None = None) -> Path:
        """Make an artifact, or only the named files, available on this machine.

        Returns the folder to read from. Folders that are not artifacts are returned unchanged.
        """
        return folder

    def publish(self, folder: Path) -> None:  # noqa: B027
        """Add a new artifact, which is complete in its folder, to the storage."""

    def uri_of_files(self, folder: Path) -> str | None:
        """URI of an artifact's files if they may not be on this machine, else None."""
        return None

    def checkpoint(self, folder: Path, fingerprint: str, seconds: float) -> "Checkpoint":
        """The training checkpoint of an artifact."""
        from agcl.files.checkpoint import Checkpoint  # Imports torch.

        return Checkpoint(artifact.checkpoint_of(folder), fingerprint, seconds)

    def checkpoint_time(self, folder: Path) -> int:
        """Time of the last write of the checkpoint in nanoseconds; 0 if there is none.

        Compare for equality only, since the writer's clock may differ.
        """
        file = artifact.checkpoint_of(folder)
        return file.stat().st_mtime_ns if file.exists() else 0

    def results(self, folder: Path) -> AbstractContextManager[None]:
        """Update a run's folder on entry and save it on exit, also after an error."""
        return nullcontext()

    def save_results(self, folder: Path) -> None:  # noqa: B027
        """Save a run's folder before the run has finished."""

    def refresh(self, file: Path) -> None:  # noqa: B027
        """Update one file in a run's folder. Removes it if the storage has no such file."""

    def delete_folder(self, folder: Path) -> None:
        """Delete a folder of results, with all that is in it."""
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class Local(Storage):
    """A folder that all nodes of the cluster can see."""

    folder: Path

    def __str__(self) -> str:
        return str(self.folder)

    @property
    @override
    def root(self) -> Path:
        return self.folder
