"""Run the sessions of a plan on a Ray cluster, as far side by side as it allows."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from pipeline.config import Resources
from pipeline.dag import Session
from pipeline.session import Mailbox, run_session
from pipeline.stages.context import Record

Observe = Callable[[list[Record]], None]
"""Takes records in order: `{"artifact", "state", ...}` or `{"artifact", "step", metric: value}`."""
_POLL_SECONDS = 0.3


@dataclass
class StageFailed(Exception):
    """A stage ended with an error, or its workers were lost."""

    stage: str
    error: str
    traceback: str
    log: Path | None = None
    """File with the traceback, once it is written."""

    def __str__(self) -> str:
        return f"stage {self.stage} failed: {self.error}"


def run_sessions(
    sessions: Sequence[Session],
    scratch: Path,
    resources: Resources,
    side_by_side: int,
    observe: Observe,
) -> None:
    """Run every session after those it depends on, at most `side_by_side` at once.

    `scratch` is a folder, shared by all nodes, for what Ray Train writes; it is removed.
    After a failure nothing new starts, what runs is finished, and `StageFailed` is raised. An
    exception of any other kind (an interrupt, say) cancels what runs.
    """
    mailbox = Mailbox.remote()  # type: ignore[attr-defined]
    waiting = {session.name: session for session in sessions}
    running: dict[Any, Session] = {}
    watch = _Watch(observe)
    failure: StageFailed | None = None
    try:
        while running or (waiting and failure is None):
            unfinished = waiting.keys() | {s.name for s in running.values()}
            for session in _ready(waiting, unfinished) if failure is None else ():
                if len(running) < side_by_side:
                    del waiting[session.name]
                    running[run_session.remote(session, resources, mailbox, scratch)] = session
            if not running:
                raise RuntimeError(f"sessions wait for each other: {sorted(waiting)}")
            done, _ = ray.wait(list(running), timeout=_POLL_SECONDS)
            watch.read(mailbox)
            for ref in done:
                failure = _result(ref, running.pop(ref), watch) or failure
    finally:
        for ref in running:
            ray.cancel(ref)
        shutil.rmtree(scratch, ignore_errors=True)
    if failure is not None:
        raise failure


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
    started = [stage for stage, record in states.items() if record.get("state") == "started"]
    reason = " ".join(str(error).split())[-300:]
    stage = (started or [session.works[0].name])[-1]
    return StageFailed(stage, f"its workers were lost ({reason})", str(error))
