"""Passes what happens in a run on to MLflow while it happens."""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from pipeline.config.config import Config
from pipeline.plan.plan import Run
from pipeline.stages.context import Record
from pipeline.tracking.client import Content, Tracker, TrackingFailed
from pipeline.tracking.run_recorder import RunRecorder

_SECONDS_BETWEEN_TRIES = 60.0
_LATER = "the run goes on unrecorded, run it again later to record it"


class Recording:
    """The MLflow side of one execution: its runs and, for several, the one above them.

    Does nothing without a tracker. When MLflow fails it says so through `warn` and the run goes
    on without. It is tried again now and then and at the end, and what is still missing then is
    recorded by running it again.
    """

    def __init__(
        self,
        tracker: Tracker | None,
        folder: Path,
        title: str,
        warn: Callable[[str], None],
        *,
        kind: str | None,
        parent: str | None = None,
    ) -> None:
        """`kind` is that of a run above all others (`comparison`, `search`), remembered in `folder`
        and continued; None goes without, or below the run `parent`."""
        self.tracker, self.warn = tracker, warn
        self.recorders: dict[str, RunRecorder] = {}
        self.own: str | None = None
        self.parent = parent
        self.added: dict[str, Callable[[Tracker, str | None], RunRecorder]] = {}
        """How to open the MLflow run of each label."""
        self.silent: Tracker | None = None
        """The tracker, while MLflow fails."""
        self.try_again_at = 0.0
        self.folder, self.title, self.kind = folder, title, kind
        with self._surviving():
            self._open_own()

    def _open_own(self) -> None:
        if self.tracker is not None and self.kind is not None:
            self.own = self.tracker.open(self.folder, self.title, {"kind": self.kind}, self.parent)
            self.parent = self.own

    def add(
        self,
        label: str,
        run: Run,
        *,
        name: str | None = None,
        kind: str = "sequence",
        without: Collection[str] = (),
    ) -> None:
        """Open the MLflow run of a run, with what is complete of it.

        It is called as its label or by `name`; `without` names stages that are left out of it.
        """

        def open_recorder(tracker: Tracker, above: str | None) -> RunRecorder:
            return RunRecorder(tracker, name or label, run, above, kind, without)

        self.added[label] = open_recorder
        with self._surviving():
            if self.tracker is not None:
                self.recorders[label] = open_recorder(self.tracker, self.parent)
                self.recorders[label].catch_up(reused=True)

    def catch_up(self, label: str) -> None:
        """Record the stages of a run that were finished since, by a process not observed here."""
        self.try_again()
        with self._surviving():
            if label in self.recorders:
                self.recorders[label].catch_up(reused=False)

    def end(
        self, label: str, metrics: Mapping[str, float], *, status: str = "FINISHED", error: str = ""
    ) -> None:
        """Log some last metrics of a run and close it."""
        self.try_again()
        with self._surviving():
            self.added.pop(label, None)
            if label in self.recorders:
                recorder = self.recorders.pop(label)
                if metrics:
                    recorder.tracker.metrics(recorder.parent, [{"step": 0, **metrics}])
                recorder.tracker.end(recorder.parent, status, error)

    @contextmanager
    def _surviving(self) -> Iterator[None]:
        try:
            yield
        except TrackingFailed as error:
            if self.silent is None:
                self.warn(f"{error}; {_LATER}")
            self.silent, self.tracker, self.recorders = self.silent or self.tracker, None, {}
            self.try_again_at = time.monotonic() + _SECONDS_BETWEEN_TRIES

    def try_again(self, *, now: bool = False) -> None:
        """Where MLflow failed a while ago, or at all, and is back, record what it missed."""
        if self.silent is None or (time.monotonic() < self.try_again_at and not now):
            return
        with self._surviving():
            self.tracker = self.silent
            if self.own is None:
                self._open_own()
            for label, open_recorder in self.added.items():
                recorder = open_recorder(self.tracker, self.parent)
                recorder.catch_up(reused=False)
                self.recorders[label] = recorder
            self.silent = None
            self.warn("MLflow is back; what it missed is recorded")

    def observe(self, records: Sequence[Record]) -> None:
        """Take records of artifacts as they come."""
        self.try_again()
        with self._surviving():
            for recorder in self.recorders.values():
                recorder.observe(records)

    def run_of(self, label: str) -> str | None:
        """The id of a run's MLflow run; None where it is not recorded."""
        return self.recorders[label].parent if label in self.recorders else None

    def finish_run(
        self, label: str, metrics: Mapping[str, Any], files: Mapping[str, Content]
    ) -> None:
        """Log a run's final metrics, and files by artifact path, and close it."""
        with self._surviving():
            if label in self.recorders:
                self.recorders[label].catch_up(reused=False)
                self.recorders[label].finish(metrics, files)

    def finish(
        self, files: Mapping[str, Content], metrics: Mapping[str, float] | None = None
    ) -> None:
        """Log files and metrics on the run above all others, and close it."""
        with self._surviving():
            if self.tracker is not None and self.own is not None:
                if metrics:
                    self.tracker.metrics(self.own, [{"step": 0, **metrics}])
                self.tracker.artifacts(self.own, files)
                self.tracker.end(self.own)

    def abort(self, status: str, error: str) -> None:
        """Close what is open as FAILED or KILLED."""
        with self._surviving():
            for recorder in self.recorders.values():
                recorder.abort(status, error)
            if self.tracker is not None and self.own is not None:
                self.tracker.end(self.own, status, error)


def connect(config: Config, console: Console) -> Tracker | None:
    """Connect to MLflow, as far as the config wants it; None, with a warning, where it is silent.

    Raises `InputError` for a bad URI, and for a storage folder that cannot be written to.
    """
    config.storage.check_writable()
    try:
        return (
            Tracker(config.storage.root, config.tracking.uri) if config.tracking.enabled else None
        )
    except TrackingFailed as error:
        warn(console, f"{error}; {_LATER}")
        return None


def warn(console: Console, message: str) -> None:
    """Print a warning of one line."""
    console.print(f"  [yellow]warning[/] {escape(message)}", highlight=False, soft_wrap=True)


def open_recording(
    tracker: Tracker | None,
    folder: Path,
    title: str,
    console: Console,
    *,
    kind: str | None,
    above: str | None = None,
) -> Recording:
    """Make the folder, and open its MLflow run if there is one above its runs."""
    folder.mkdir(parents=True, exist_ok=True)
    return Recording(tracker, folder, title, partial(warn, console), kind=kind, parent=above)
