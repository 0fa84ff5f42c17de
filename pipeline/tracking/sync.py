"""MLflow as a mirror of the storage.

Everything that MLflow shows of a finished stage is in the stage's artifact, so MLflow may be down
at any time: `sync` asks it which stages it knows and records the others from their artifacts.
While MLflow answers, running stages are shown live.
"""

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from agcl.errors import InputError, one_line
from rich.console import Console

from pipeline.config.config import Config
from pipeline.execution.cluster import check_address
from pipeline.execution.progress import warn
from pipeline.plan.plan import Run
from pipeline.results.files import BASE_FILE, REPORT_FILE, TABLE_FILE
from pipeline.results.results import METRIC_TITLES, metric, metric_name
from pipeline.results.run_folder import locked
from pipeline.secrets import masked
from pipeline.stages.context import Record
from pipeline.stages.files import METRICS
from pipeline.tracking.client import TrackingFailed
from pipeline.tracking.metric_files import MetricFiles
from pipeline.tracking.mirrored_run import MirroredRun
from pipeline.tracking.tracker import Content, Tracker

_SECONDS_BETWEEN_SYNCS = 60.0
_SECONDS_BETWEEN_BATCHES = 2.0
_LARGEST_SHARE = 0.1
"""Maximum share of a run's time that attempts to reach MLflow may take."""


class Mirror:
    """The MLflow side of one execution: its runs and, optionally, one run above them.

    A context manager, to be entered before runs are added; an exception closes what is open as
    FAILED or KILLED. No method raises because MLflow fails: that prints one warning, and MLflow is
    tried again every minute, more rarely if an attempt takes long, and by `sync(now=True)`. A run
    that MLflow refuses keeps no other from being recorded.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        title: str,
        console: Console,
        *,
        kind: str | None = None,
        parent_id: str | None = None,
    ) -> None:
        """Connect, if the config enables it.

        `kind` (`comparison`, `search`) adds a run called `title` above the others, whose id is kept
        in `folder`. `parent_id` is the parent of that run, or of all runs if there is none. Raises
        `InputError` for a bad URI and for a storage folder that cannot be written.
        """
        config.storage.check_writable()
        self.config, self.console = config, console
        self.folder, self.title = folder, title
        self.kind, self.parent_id = kind, parent_id
        self.run_id: str | None = None
        """Id of the run above the others."""
        self._runs: dict[str, MirroredRun] = {}
        """By label, until MLflow knows that they ended."""
        self._files: dict[str, MetricFiles] = {}
        """By label, until the run ends."""
        self._unsent: list[Record] = []
        self._synced = self._sent = time.monotonic()
        self._behind: dict[str, str] = {}
        """Why MLflow lacks something: by the label of a run that it refused, by "" if it failed."""
        self._waited = 0.0
        """Seconds that the last attempt to reach MLflow took, after a failure."""
        self._tracker: Tracker | None = None
        """None while MLflow is down."""
        try:
            self._connect()
        except TrackingFailed as error:
            if not error.no_answer:
                raise InputError(f"tracking.uri: {error}") from None
            self._fall_behind(error)

    def __enter__(self) -> "Mirror":
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._surviving():
            self._open_own()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        status = "FAILED" if error is None or isinstance(error, Exception) else "KILLED"
        for files in self._files.values():
            files.close()
        for label, run in self._runs.items():  # Without an exception: runs that failed alone.
            with self._surviving(label):
                if self._tracker:
                    run.abort(status, str(error or ""))
        with self._surviving():
            if self._tracker and self.run_id and error is not None:
                self._tracker.end(self.run_id, status, str(error))

    def add(
        self, label: str, run: Run, *, kind: str = "sequence", without: Collection[str] = ()
    ) -> None:
        """Open a run's MLflow run and record its complete stages, ignoring those in `without`.

        It is called `label` below a run of this execution, else by the title.
        """
        if formats := self.config.tracking.report_to:
            self._files[label] = MetricFiles(run, formats)
        if self.config.tracking.enabled:
            name = label if self.kind else self.title
            with self._surviving():
                self._runs[label] = MirroredRun(run, name, kind, without)
            self.sync(label)

    def sync(self, label: str | None = None, *, now: bool = False) -> None:
        """Record every finished stage of a run that MLflow does not know.

        With `now`, or after a while, do so for all runs, and reconnect first if MLflow was down.
        """
        labels = [label] if label in self._runs else []
        was_behind = bool(self._behind)
        with self._surviving():
            pause = _SECONDS_BETWEEN_SYNCS
            if not self._tracker:  # A server that is silent holds up the run at each attempt.
                pause = max(pause, self._waited / _LARGEST_SHARE)
            if now or time.monotonic() - self._synced >= pause:
                self._synced, labels = time.monotonic(), list(self._runs)
                if not self._tracker:
                    try:
                        self._connect()
                        self._open_own()
                    finally:
                        self._waited = time.monotonic() - self._synced
        for each in labels:
            with self._surviving(each):
                if self._tracker:
                    run = self._runs[each]
                    has_ended = run.sync(self._tracker, self.run_id or self.parent_id)
                    self._behind.pop(each, None)
                    if has_ended:
                        del self._runs[each]
                    if run.registered:
                        line = f"registered  models:/{run.registered}"
                        self.console.print(line, highlight=False)
        if self._tracker:
            self._behind.pop("", None)
        if was_behind and not self._behind:
            self.console.print("  MLflow is back; recorded what it missed", highlight=False)

    def observe(self, records: Sequence[Record]) -> None:
        """Show running stages live. Takes the records of artifacts in order."""
        self.sync()
        for files in self._files.values():
            files.observe(records)
        self._unsent += records
        is_due = time.monotonic() - self._sent >= _SECONDS_BETWEEN_BATCHES
        if is_due or any("state" in record for record in records):
            batch, self._unsent, self._sent = self._unsent, [], time.monotonic()
            for label, run in self._runs.items():
                with self._surviving(label):
                    if self._tracker and run.id:  # Without one, MLflow refused it.
                        run.observe(batch)

    def run_of(self, label: str) -> str | None:
        """Id of a run's MLflow run; None if it is not recorded."""
        return (self._runs[label].id or None) if label in self._runs else None

    def finish_run(
        self, label: str, results: Mapping[str, Any], files: Mapping[str, Content], note: str = ""
    ) -> None:
        """`end` a run with its final results; `note` describes it in Markdown."""
        found = {metric_name(key): metric(results, key) for key in METRIC_TITLES}
        numbers = {name: value for name, value in found.items() if value is not None}
        self.end(label, {"step": len(results["tasks"]), **numbers}, files, note=note)

    def end(
        self,
        label: str,
        metrics: Mapping[str, float],
        files: Mapping[str, Content] | None = None,
        *,
        status: str = "FINISHED",
        error: str = "",
        note: str = "",
    ) -> None:
        """Record what is missing of a run, last metrics and files by artifact path, and close it.

        If MLflow is down, a later `sync` does all that.
        """
        if label in self._files:
            self._files.pop(label).rewrite()
        if label in self._runs:
            run = self._runs[label]
            run.ending = partial(run.end, metrics, files or {}, status, error, note)
            self.sync(label)

    def finish(
        self,
        files: Mapping[str, Content],
        metrics: Sequence[Mapping[str, float]] = (),
        *,
        tags: Mapping[str, str] | None = None,
        params: Mapping[str, Any] | None = None,
        note: str = "",
        error: str = "",
    ) -> None:
        """Log all this on the run above the others, and close it; FAILED with `error`.

        `metrics` are records, logged by their `step`.
        """
        with self._surviving():
            if self._tracker and self.run_id:
                self._tracker.tags(self.run_id, tags or {}, note)
                self._tracker.params(self.run_id, params or {})
                self._tracker.metrics(self.run_id, metrics)
                self._tracker.artifacts(self.run_id, files)
                self._tracker.end(self.run_id, "FAILED" if error else "FINISHED", error)

    def _connect(self) -> None:
        if self.config.tracking.enabled:
            self._tracker = Tracker(
                self.config.storage.root, self.config.tracking.uri, self.config.tracking.experiment
            )

    def _open_own(self) -> None:
        if self._tracker and self.kind:
            self.run_id = self._tracker.open(
                self.folder, self.title, {"kind": self.kind}, self.parent_id
            )

    @contextmanager
    def _surviving(self, label: str = "") -> Iterator[None]:
        """`label` is the run that MLflow is told of."""
        try:
            yield
        except (TrackingFailed, OSError, InputError) as error:  # The storage raises the latter two.
            is_refused = isinstance(error, TrackingFailed) and not error.no_answer
            self._fall_behind(error, label if is_refused else "")

    def _fall_behind(self, error: Exception, label: str = "") -> None:
        """Do without MLflow; if it refused the run `label`, only this run does."""
        said = masked(one_line(error))
        if label not in self._behind and said not in self._behind.values():
            without = "" if label else "continuing without MLflow; "
            warn(self.console, f"{said}; {without}rerun the same command to record it")
        self._behind[label] = said
        if label:
            self._runs[label].forget()
            return
        self._tracker, self._synced = None, time.monotonic()
        self._unsent = []
        for run in self._runs.values():
            run.forget()


def files_for_mlflow(folder: Path, figures: Mapping[str, str]) -> dict[str, Content]:
    """The results and figures of a folder to upload to MLflow, by artifact path."""
    names = (METRICS, REPORT_FILE, TABLE_FILE, BASE_FILE)
    files: dict[str, Content] = {name: folder / name for name in names if (folder / name).exists()}
    return files | {f"figures/{name}": svg for name, svg in figures.items()}


@contextmanager
def mirrored(
    config: Config,
    folder: Path,
    title: str,
    console: Console,
    *,
    kind: str | None,
    parent_id: str | None = None,
) -> Iterator[Mirror]:
    """Lock a folder against other commands, mirror it in MLflow, and save it on exit.

    Waits while another command holds the lock.
    """
    check_address()
    mirror = Mirror(config, folder, title, console, kind=kind, parent_id=parent_id)
    with locked(folder, console), config.storage.results(folder), mirror:
        yield mirror
