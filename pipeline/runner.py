"""Run the sessions of a plan on a Ray cluster, as far side by side as it allows."""

import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from rich.console import Console

from pipeline.cluster import cluster
from pipeline.config import Resources
from pipeline.dag import Session
from pipeline.failures import why_lost
from pipeline.progress import StageProgress
from pipeline.secrets import masked
from pipeline.session import Mailbox, here, run_session
from pipeline.stages.context import Record

Observe = Callable[[list[Record]], None]
"""Takes records in order: `{"artifact", "state", ...}` or `{"artifact", "step", metric: value}`."""
_POLL_SECONDS = 0.3
_SCRATCH = ".ray-train"


@dataclass
class StageFailed(Exception):
    """A stage ended with an error, or its workers were lost."""

    stage: str
    error: str
    traceback: str
    log: Path | None = None
    """File with the traceback, once it is written; a full disk may have no room for it."""

    def __str__(self) -> str:
        return f"stage {self.stage} failed: {self.error}" + (f" (log: {self.log})" * bool(self.log))


def run_with_progress(
    todo: Sequence[Session],
    folder: Path,
    resources: Resources,
    record: Observe,
    console: Console,
    *,
    side_by_side: int | None = None,
    keep_going: bool = False,
) -> list[StageFailed]:
    """Run sessions, if there are any, and show how far they are.

    They run on the cluster that Ray is on already, where the caller says how many of them at once
    (`side_by_side`); else on the cluster to join, or one of this machine's own.
    """
    if side_by_side is None:
        number = sum(len(session.works) for session in todo)
        start = f"{number} stages to run; starting Ray"
        console.print(f"  {start if todo else 'every stage is complete already'}", highlight=False)
    if not todo:
        shutil.rmtree(folder / _SCRATCH, ignore_errors=True)  # Of one killed after its last stage.
        return []
    shared = {owner for session in todo for owner in session.owners}
    titles = {
        work.folder.name: work.name
        if set(session.owners) == shared
        else f"{work.name} ({_names(session.owners)})"
        for session in todo
        for work in session.works
    }
    with (
        nullcontext(side_by_side) if side_by_side else cluster(resources) as at_once,
        StageProgress(console, titles) as progress,
    ):

        def observe(records: list[Record]) -> None:
            progress.observe(records)
            record(records)

        scratch = folder / _SCRATCH
        return run_sessions(todo, scratch, resources, at_once, observe, keep_going=keep_going)


def _names(owners: Sequence[str], most: int = 3) -> str:
    return ", ".join(owners) if len(owners) <= most else f"{len(owners)} runs"


def run_sessions(
    sessions: Sequence[Session],
    scratch: Path,
    resources: Resources,
    side_by_side: int,
    observe: Observe,
    *,
    keep_going: bool = False,
) -> list[StageFailed]:
    """Run every session after those it depends on, at most `side_by_side` at once.

    `scratch` is a folder, shared by all nodes, for what Ray Train writes; it is removed.
    Gives the failures. After the first one nothing new starts and what runs is finished; with
    `keep_going` only what needs the failed session is left out. An exception (an interrupt, say)
    cancels what runs; `StageFailed` is raised where what tells of all of them was lost.
    """
    # Beside the driver, so that a worker's node takes neither records nor who restarts a session.
    mailbox = Mailbox.options(scheduling_strategy=here()).remote()  # type: ignore[attr-defined]
    start = run_session.options(scheduling_strategy=here()).remote
    waiting = {session.name: session for session in sessions}
    running: dict[Any, Session] = {}
    watch = _Watch(observe)
    failures: list[StageFailed] = []
    lost: set[str] = set()
    try:
        while running or waiting:
            unfinished = waiting.keys() | {s.name for s in running.values()} | lost
            for session in _ready(waiting, unfinished):
                if len(running) < side_by_side:
                    del waiting[session.name]
                    running[start(session, resources, mailbox, scratch)] = session
            if not running:
                raise RuntimeError(f"sessions wait for each other: {sorted(waiting)}")
            done, _ = ray.wait(list(running), timeout=_POLL_SECONDS)
            watch.read(mailbox)
            for ref in done:
                session = running.pop(ref)
                if failure := _result(ref, session, watch):
                    failures.append(failure)
                    lost.add(session.name)
                    waiting = _without(lost, waiting) if keep_going else {}
    except ray.exceptions.RayError as error:  # The mailbox is gone, so nobody can tell.
        raise _failure(next(iter(running.values())), watch, error) from error
    finally:
        for ref in running:
            ray.cancel(ref)
        shutil.rmtree(scratch, ignore_errors=True)
    return failures


def _without(lost: set[str], waiting: dict[str, Session]) -> dict[str, Session]:
    """The sessions that need none of the lost ones; adds the others to the lost."""
    while hit := {name for name, session in waiting.items() if session.after & lost} - lost:
        lost |= hit
    return {name: session for name, session in waiting.items() if name not in lost}


def _ready(waiting: dict[str, Session], unfinished: set[str]) -> list[Session]:
    return [s for s in waiting.values() if not s.after & unfinished]


class _Watch:
    """Passes records on and remembers which stage runs and which failed."""

    def __init__(self, observe: Observe) -> None:
        self.observe = observe
        self.state: dict[str, Record] = {}

    def read(self, mailbox: Any) -> None:
        records = []
        for record in ray.get(mailbox.take.remote()):
            if "state" in record:
                if self.state.get(record["artifact"], {}).get("state") == "failed":
                    continue  # Other workers fail as a consequence of the first.
                self.state[record["artifact"]] = record
            records.append(record)
        if records:
            self.observe(records)


def _result(ref: Any, session: Session, watch: _Watch) -> StageFailed | None:
    try:
        ray.get(ref)
    except ray.exceptions.RayError as error:
        return _failure(session, watch, error)
    return None


def _failure(session: Session, watch: _Watch, error: Exception) -> StageFailed:
    states = {work.name: watch.state.get(work.folder.name, {}) for work in session.works}
    for stage, record in states.items():
        if record.get("state") == "failed":
            return StageFailed(stage, str(record["error"]), str(record["traceback"]))
    begun = ("started", "lost")
    started = [stage for stage, record in states.items() if record.get("state") in begun]
    stage = (started or [session.works[0].name])[-1]
    return StageFailed(stage, why_lost(error), masked(str(error)))
