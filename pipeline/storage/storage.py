"""What every storage can do, and the plain folder that is one.

All paths that a storage takes and gives are on this machine, below `root`. A plain folder is
itself that place; for a bucket it is a cache.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from agcl.errors import InputError
from typing_extensions import override

from pipeline.storage import artifact

if TYPE_CHECKING:
    from agcl.files.checkpoint import Checkpoint

STAGES = "stages"
"""The folder of all artifacts."""


class Storage(ABC):
    """Where the folders of runs and the artifacts of stages live."""

    shared: ClassVar[bool]
    """Whether all nodes of a cluster see the same files below `root`."""

    @property
    @abstractmethod
    def root(self) -> Path:
        """The folder on this machine."""

    @property
    @abstractmethod
    def tracking_uri(self) -> str | None:
        """Where MLflow records by default; None where there is no place for its database."""

    @abstractmethod
    def place(self, path: Path) -> str:
        """Where a user finds what is at a path: the path, or its URI in a bucket."""

    def check(self) -> None:
        """Raises `InputError` if the storage cannot be read. Writes nothing."""
        existing = next(path for path in (self.root, *self.root.parents) if path.exists())
        if not existing.is_dir():
            raise InputError(f"storage: {existing} is not a folder")

    def check_writable(self) -> None:
        """Raises `InputError` if the storage cannot be written."""
        existing = next(path for path in (self.root, *self.root.parents) if path.exists())
        for folder in (existing, existing / STAGES):
            if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
                raise InputError(f"storage: {folder} cannot be written to")

    @abstractmethod
    def is_complete(self, folder: Path, fingerprint: str) -> bool:
        """Whether the artifact is complete. Raises `CorruptArtifact` if it is another one."""

    def publish_left_over(self, folder: Path, fingerprint: str) -> bool:
        """Like `is_complete`, after finishing an upload that was cut off."""
        return self.is_complete(folder, fingerprint)

    @abstractmethod
    def manifest(self, folder: Path) -> dict[str, Any] | None:
        """The manifest of a complete artifact, or None."""

    @abstractmethod
    def read(self, folder: Path, name: str) -> bytes | None:
        """The content of one file of a complete artifact, or None if it has no such file."""

    def fetch(self, folder: Path, names: Collection[str] | None = None) -> Path:
        """Make an artifact, or only the files of these names, readable on this machine.

        Returns the folder to read from. Folders that are no artifacts are returned as they are.
        """
        return folder

    @abstractmethod
    def publish(self, folder: Path) -> None:
        """Make an artifact just written the storage's."""

    def uri_of_files(self, folder: Path) -> str | None:
        """Where the files of an artifact are when they need not be on this machine."""
        return None

    def checkpoint(self, folder: Path, fingerprint: str, seconds: float) -> "Checkpoint":
        """The checkpoint of the training that makes an artifact."""
        from agcl.files.checkpoint import Checkpoint  # It imports torch.

        return Checkpoint(artifact.checkpoint_of(folder), fingerprint, seconds)

    def checkpoint_time(self, folder: Path) -> int:
        """When that checkpoint was last written, in nanoseconds; 0 without one.

        Compare for equality only: the writer may have another clock.
        """
        file = artifact.checkpoint_of(folder)
        return file.stat().st_mtime_ns if file.exists() else 0

    def results(self, folder: Path) -> AbstractContextManager[None]:
        """Work on a run's folder: current when entered, saved when left, also after an error."""
        return nullcontext()

    @abstractmethod
    def save_results(self, folder: Path) -> None:
        """Save a run's folder in the middle of the work on it."""

    @abstractmethod
    def refresh(self, file: Path) -> None:
        """Make one file of a run's folder current, which may remove it."""

    def forget(self, file: Path) -> None:
        """Remove one file of a run's folder for good."""
        file.unlink(missing_ok=True)


@dataclass(frozen=True)
class Local(Storage):
    """A folder that all nodes of a cluster see."""

    folder: Path
    shared = True

    def __str__(self) -> str:
        return str(self.folder)

    @property
    @override
    def root(self) -> Path:
        return self.folder

    @property
    @override
    def tracking_uri(self) -> str:
        return f"sqlite:///{self.folder / 'mlflow.db'}"

    @override
    def place(self, path: Path) -> str:
        return str(path)

    @override
    def is_complete(self, folder: Path, fingerprint: str) -> bool:
        return artifact.is_complete(folder, fingerprint)

    @override
    def manifest(self, folder: Path) -> dict[str, Any] | None:
        return artifact.read_manifest(folder)

    @override
    def read(self, folder: Path, name: str) -> bytes | None:
        return (folder / name).read_bytes() if (folder / name).is_file() else None

    @override
    def publish(self, folder: Path) -> None:
        pass

    @override
    def save_results(self, folder: Path) -> None:
        pass

    @override
    def refresh(self, file: Path) -> None:
        pass
