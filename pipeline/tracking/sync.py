"""MLflow as a mirror of the storage.

Everything that MLflow shows of a finished stage is in the stage's artifact, so MLflow may be down
at any time: `sync` asks it which stages it knows and records the others from their artifacts.
While MLflow answers, running stages are shown live.
"""

import json
import os
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

from agcl.errors import InputError
from rich.console import Console
from rich.markup import escape

from pipeline.config.config import Config
from pipeline.plan.plan import Run
from pipeline.plan.stage import Work
from pipeline.results.model_card import LOCATION, MODEL
from pipeline.secrets import masked
from pipeline.stages.context import LOG_FILE, Record
from pipeline.stages.evaluate import SCORES, TEXT
from pipeline.stages.prepare import SUMMARY
from pipeline.stages.train import IMPORTANCE_FILE
from pipeline.storage import object_store
from pipeline.tracking.client import Content, Tracker, TrackingFailed

_SECONDS_BETWEEN_SYNCS = 60.0
_SECONDS_BETWEEN_BATCHES = 2.0
_LARGEST_COPY = 256 * 2**20


class Mirror:
    """The MLflow side of one execution: its runs and, optionally, one run above them.

    A context manager, to be entered before runs are added; an exception closes what is open as
    FAILED or KILLED. No method raises because MLflow fails: that prints one warning, and MLflow is
    tried again every minute and by `sync(now=True)`.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        title: str,
        console: Console,
        *,
        kind: str | None = None,
        above: str | None = None,
    ) -> None:
        """Connect, if the config enables it.

        `kind` (`comparison`, `search`) adds a run called `title` above the others, whose id is kept
        in `folder`. `above` is the parent of that run, or of all runs if there is none. Raises
        `InputError` for a bad URI and for a storage folder that cannot be written.
        """
        _check_writable(config.local_storage)
        if isinstance(config.storage, str):
            object_store.check_writable(config.storage)
        self.config, self.console = config, console
        self.folder, self.title = folder, title
        self.kind, self.above = kind, above
        self.own: str | None = None
        """Id of the run above the others."""
        self._runs: dict[str, _MirroredRun] = {}
        """By label, until MLflow knows that they ended."""
        self._unsent: list[Record] = []
        self._synced = self._sent = time.monotonic()
        self._is_behind = False
        """Whether MLflow failed and lacks what has happened since."""
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
        with self._surviving():
            if self._tracker:
                for run in self._runs.values():  # Without an exception: runs that failed alone.
                    run.abort(self._tracker, status, str(error or ""))
                if self.own and error is not None:
                    self._tracker.end(self.own, status, str(error))

    def add(
        self, label: str, run: Run, *, kind: str = "sequence", without: Collection[str] = ()
    ) -> None:
        """Open a run's MLflow run and record its complete stages, ignoring those in `without`.

        It is called `label` below a run of this execution, else by the title.
        """
        if self.config.tracking.enabled:
            name = label if self.kind else self.title
            with self._surviving():
                self._runs[label] = _MirroredRun(run, name, kind, without)
            self.sync(label)

    def sync(self, label: str | None = None, *, now: bool = False) -> None:
        """Record every finished stage of a run that MLflow does not know.

        With `now`, or after a minute, do so for all runs, and reconnect first if MLflow was down.
        """
        labels = [label] if label in self._runs else []
        with self._surviving():
            if now or time.monotonic() - self._synced >= _SECONDS_BETWEEN_SYNCS:
                self._synced, labels = time.monotonic(), list(self._runs)
                if not self._tracker:
                    self._connect()
                    self._open_own()
            if self._tracker:
                for each in labels:
                    if self._runs[each].sync(self._tracker, self.own or self.above):
                        del self._runs[each]
                if self._is_behind:
                    self._is_behind = False
                    self.console.print("  MLflow is back; recorded what it missed", highlight=False)

    def observe(self, records: Sequence[Record]) -> None:
        """Show running stages live. Takes the records of artifacts in order."""
        self.sync()
        self._unsent += records
        is_due = time.monotonic() - self._sent >= _SECONDS_BETWEEN_BATCHES
        if is_due or any("state" in record for record in records):
            batch, self._unsent, self._sent = self._unsent, [], time.monotonic()
            with self._surviving():
                for run in self._runs.values():
                    if self._tracker:
                        run.observe(self._tracker, batch)

    def run_of(self, label: str) -> str | None:
        """Id of a run's MLflow run; None if it is not recorded."""
        return self._runs[label].id if label in self._runs else None

    def finish_run(
        self, label: str, results: Mapping[str, Any], files: Mapping[str, Content]
    ) -> None:
        """`end` a run with its final results."""
        numbers = {key: value for key, value in results.items() if isinstance(value, float)}
        if results["forgetting"]["mean"] is not None:
            numbers["forgetting"] = results["forgetting"]["mean"]
        self.end(label, {"step": len(results["tasks"]), **numbers}, files)

    def end(
        self,
        label: str,
        metrics: Mapping[str, float],
        files: Mapping[str, Content] | None = None,
        *,
        status: str = "FINISHED",
        error: str = "",
    ) -> None:
        """Record what is missing of a run, last metrics and files by artifact path, and close it.

        If MLflow is down, a later `sync` does all that.
        """
        if label in self._runs:
            self._runs[label].ending = _Ending(metrics, files or {}, status, error)
            self.sync(label)

    def finish(
        self, files: Mapping[str, Content], metrics: Mapping[str, float] | None = None
    ) -> None:
        """Log files and metrics on the run above the others, and close it."""
        with self._surviving():
            if self._tracker and self.own:
                self._tracker.metrics(self.own, [metrics or {}])
                self._tracker.artifacts(self.own, files)
                self._tracker.end(self.own)

    def _connect(self) -> None:
        if self.config.tracking.enabled:
            self._tracker = Tracker(self.config.local_storage, self.config.tracking.uri)

    def _open_own(self) -> None:
        if self._tracker and self.kind:
            self.own = self._tracker.open(self.folder, self.title, {"kind": self.kind}, self.above)

    @contextmanager
    def _surviving(self) -> Iterator[None]:
        try:
            yield
        except (TrackingFailed, OSError, InputError) as error:  # The storage raises the latter two.
            self._fall_behind(error)

    def _fall_behind(self, error: Exception) -> None:
        if not self._is_behind:
            said = masked(" ".join(str(error).split()))
            later = "continuing without MLflow; rerun the same command to record it"
            warn(self.console, f"{said}; {later}")
        self._tracker, self._is_behind, self._synced = None, True, time.monotonic()
        self._unsent = []
        for run in self._runs.values():
            run.forget()


@dataclass(frozen=True)
class _Ending:
    metrics: Mapping[str, float]
    files: Mapping[str, Content]
    status: str
    error: str


class _MirroredRun:
    """A run, and what MLflow has of it: its own run, with one child per stage."""

    def __init__(self, run: Run, name: str, kind: str, without: Collection[str]) -> None:
        self.run, self.name, self.kind = run, name, kind
        # Equal stages share an artifact, and have one child.
        self.stages = {w.folder.name: s for s, w in run.works.items() if s not in without}
        self.works = {stage: run.works[stage] for stage in self.stages.values()}
        self.complete: set[str] = set()
        self._find_complete()
        self.reused = frozenset(self.complete)
        self.ending: _Ending | None = None
        self.forget()

    def forget(self) -> None:
        """After a failure MLflow may lack what it was sent: ask it again what it has."""
        self.id: str | None = None
        self.children: defaultdict[str, list[str]] = defaultdict(list)
        """Run ids by fingerprint; several if an answer of MLflow was lost."""
        self.recorded: set[str] = set()
        """Fingerprints of stages whose child is finished."""
        self.live: dict[str, str] = {}
        """Children of running stages."""
        self.whole: set[str] = set()
        """Stages whose live child has every record since they started."""

    def _find_complete(self) -> None:
        unknown = [stage for stage in self.works if stage not in self.complete]
        with ThreadPoolExecutor() as pool:  # An object store takes a while per request.
            found = list(pool.map(Work.is_complete, (self.works[stage] for stage in unknown)))
        self.complete |= {stage for stage, done in zip(unknown, found, strict=True) if done}

    def sync(self, tracker: Tracker, above: str | None) -> bool:
        """Record what MLflow does not know; True if that includes the run's end."""
        if self.id is None:
            self._open(tracker, above)
        if self.ending:
            self.whole.clear()  # Nothing runs any more, whether its last record came or not.
        self._find_complete()
        for stage, work in self.works.items():
            is_recorded = work.fingerprint in self.recorded or stage in self.whole
            if stage in self.complete and not is_recorded:
                self._record(tracker, stage)
        if self.ending:
            self._end(tracker, self.ending)
        return self.ending is not None

    def observe(self, tracker: Tracker, records: Sequence[Record]) -> None:
        """Show stages that run, and finish or fail their children when they do."""
        by_stage = sorted(records, key=lambda record: str(record["artifact"]))  # Keeps the order.
        for (artifact, is_state), group in groupby(
            by_stage, lambda record: (str(record["artifact"]), "state" in record)
        ):
            stage = self.stages.get(artifact)
            if stage and is_state:
                for record in group:
                    self._change(tracker, stage, record)
            elif stage and self.works[stage].fingerprint not in self.recorded:
                if stage not in self.live:  # MLflow was down when it started.
                    self.live[stage] = self._start(tracker, stage)
                self._log(tracker, stage, self.live[stage], group)

    def _change(self, tracker: Tracker, stage: str, record: Record) -> None:
        child, is_whole = self.live.pop(stage, None), stage in self.whole
        self.whole.discard(stage)
        if record["state"] == "started":
            self.live[stage] = self._start(tracker, stage)
            self.whole.add(stage)
        elif record["state"] == "finished":
            self.complete.add(stage)
            if child and is_whole:
                self._finish(tracker, stage, child)
            elif self.works[stage].fingerprint not in self.recorded:
                self._record(tracker, stage)
        elif child:
            tracker.end(child, "FAILED", str(record["error"]))

    def _open(self, tracker: Tracker, above: str | None) -> None:
        config, folder = self.run.config, self.run.folder
        tags = {"kind": self.kind, "method": config.method, "seed": str(config.seed)}
        run_id = tracker.open(folder, self.name, tags, above)
        tracker.params(run_id, config.model_dump(mode="json"))
        tracker.artifacts(run_id, {"config.yaml": folder / "config.yaml"})
        for child in tracker.children(run_id):
            self.children[child.fingerprint].append(child.run_id)
            if child.is_finished:
                self.recorded.add(child.fingerprint)
        self.id = run_id

    def _start(self, tracker: Tracker, stage: str, at: float | None = None) -> str:
        """A new child for a stage, replacing earlier ones."""
        fingerprint = self.works[stage].fingerprint
        self.recorded.discard(fingerprint)
        for old in self.children.pop(fingerprint, []):
            tracker.discard(old)
        kind, _, task = stage.partition("/")
        tags = {"kind": "stage", "stage": kind, "task": task, "fingerprint": fingerprint}
        if stage in self.reused:
            tags["reused"] = "true"
        child = tracker.start(stage, tags, self.id, at)
        self.children[fingerprint].append(child)
        tracker.params(child, self.works[stage].config)
        return child

    def _record(self, tracker: Tracker, stage: str) -> None:
        """Record a complete stage from its artifact, with the artifact's times."""
        work = self.works[stage]
        started, ended = _times(work)
        child = self._start(tracker, stage, started)
        lines = (work.read(LOG_FILE) or b"").splitlines()
        self._log(tracker, stage, child, map(json.loads, lines), ended)
        self._finish(tracker, stage, child, ended)

    def _log(
        self,
        tracker: Tracker,
        stage: str,
        child: str,
        records: Iterable[Record],
        at: float | None = None,
    ) -> None:
        """Log metrics; scores by the run's tasks, so that one chart can show run and stages."""
        step = {"step": _task_index(stage)} if stage.startswith("evaluate/") else {}
        tracker.metrics(child, [{**record, **step} for record in records], at)

    def _finish(self, tracker: Tracker, stage: str, child: str, at: float | None = None) -> None:
        """Log what a stage made on the run, and finish the stage's child."""
        assert self.id
        work, (kind, _, task) = self.works[stage], stage.partition("/")
        if kind == "evaluate":
            scores = self._scores(work, _task_index(stage))
            tracker.metrics(self.id, [scores], _times(work)[1])
        elif kind == "attribute":
            tracker.artifacts(self.id, _importance(work, f"importance/{task}"))
        elif kind == "prepare":
            source = f"{work.place}/{SUMMARY}"
            tracker.dataset(self.id, stage, work.fingerprint[:32], source)
        tracker.end(child, at=at)
        self.recorded.add(work.fingerprint)
        self.live.pop(stage, None)

    def _scores(self, work: Work, index: int) -> dict[str, float]:
        """The row of the accuracy matrix, with the task index as step."""
        tasks, scores = self.run.plan.tasks, json.loads(work.read(SCORES) or b"")
        row: dict[str, float] = {
            f"{name}/{task}": score for task, sets in scores.items() for name, score in sets.items()
        }
        for name in scores[tasks[0]]:
            if all(name in scores[task] for task in tasks):
                seen = [scores[task][name] for task in tasks[: max(index, 1)]]
                row[f"{name}/average_of_seen_tasks"] = fmean(seen)
        if (text := work.read(TEXT)) is not None:
            row["text_loss"] = json.loads(text)["loss"]
        return {"step": index, **row}

    def _end(self, tracker: Tracker, ending: _Ending) -> None:
        assert self.id
        made = [work for stage, work in self.works.items() if stage in self.complete]
        tracker.metrics(self.id, [ending.metrics], _times(made[-1])[1] if made else None)
        tracker.artifacts(self.id, ending.files)
        name, model = self.run.config.tracking.register_model, self.run.folder / MODEL
        if name and model.is_dir():
            tracker.register(self.id, name, model)
        tracker.end(self.id, ending.status, ending.error)

    def abort(self, tracker: Tracker, status: str, error: str) -> None:
        """Close what is open as FAILED or KILLED."""
        if self.id:
            for child in self.live.values():
                tracker.end(child, status)
            tracker.end(self.id, status, error)


def _task_index(stage: str) -> int:
    """How many tasks of the sequence were trained before `evaluate/2-rivers`."""
    return int(stage.partition("/")[2].partition("-")[0])


def _times(work: Work) -> tuple[float, float]:
    """When a complete stage was started and finished, in seconds since 1970.

    With the latter a point is in MLflow once, however often it is sent.
    """
    manifest = work.manifest() or {}
    return manifest["started"], manifest["started"] + manifest["seconds"]


def _importance(work: Work, path: str) -> Mapping[str, Content]:
    """The importance file, or its location if it is large or not on this machine."""
    file = work.folder / IMPORTANCE_FILE
    if file.exists() and file.stat().st_size <= _LARGEST_COPY:
        return {f"{path}/{IMPORTANCE_FILE}": file}
    return {f"{path}/{LOCATION}": f"{work.place}/{IMPORTANCE_FILE}"}


def warn(console: Console, message: str) -> None:
    """Print a warning of one line."""
    console.print(f"  [yellow]warning[/] {escape(message)}", highlight=False, soft_wrap=True)


def _check_writable(storage: Path) -> None:
    there = next(path for path in (storage, *storage.parents) if path.exists())
    for folder in (there, there / "stages"):
        if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
            raise InputError(f"storage: {folder} cannot be written to")
