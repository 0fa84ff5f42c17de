"""Errors that end a command with one line and exit code 1."""

from dataclasses import dataclass
from pathlib import Path


class Failed(Exception):
    """Base class; `str(error)` is the line to print."""


class RayFailed(Failed):
    """Ray did not start, or could not be joined."""


@dataclass
class StageFailed(Failed):
    """A stage ended with an error, or its workers were lost."""

    stage: str
    error: str
    traceback: str
    log: Path | None = None
    """File with the traceback, once it is written; a full disk may have no room for it."""

    def __str__(self) -> str:
        return f"stage {self.stage} failed: {self.error}" + (f" (log: {self.log})" * bool(self.log))
