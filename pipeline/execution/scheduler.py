"""Runs the sessions of a plan on a Ray cluster, as many at a time as fit.

Sessions whose inputs exist are queued in the mailbox, and groups of workers (`workers.run_group`)
take them from there. The driver starts one group per queued session, up to the number that fits.
"""

import shutil
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from rich.console import Console

from pipeline.config.resources import Resources
from pipeline.errors import StageFailed
from pipeline.execution.cluster import cluster
from pipeline.execution.failures import why_lost
from pipeline.execution.mailbox import Mailbox
from pipeline.execution.progress import StageProgress
from pipeline.execution.workers import LOSSES, here, progress_marker, run_group
from pipeline.plan.schedule import Session
from pipeline.secrets import masked
from pipeline.stages.context import Emit, Record

_POLL_SECONDS = 0.3
SCRATCH = ".ray-train"
"""Folder of Ray Train's own files, in that of the run."""


def run_with_progress(
    todo: Sequence[Session],
    folder: Path,
    resources: Resources,
    record: Emit,
    console: Console,
    *,
    side_by_side: int | None = None,
    keep_going: bool = False,
) -> list[StageFailed]:
    """Run sessions, if there are any, and show their progress.

    With `side_by_side`, run that many at a time on the cluster that Ray is connected to. Otherwise,
    join the cluster at `RAY_ADDRESS` or start one on this machine.
    """
    if side_by_side is None:
        number = sum(len(session.stages) for session in todo)
        start = f"stages to run: {number}; starting Ray"
        console.print(f"  {start if todo else 'every stage is complete already'}", highlight=False)
    if not todo:
        shutil.rmtree(folder / SCRATCH, ignore_errors=True)  # Left by a killed driver.
        return []
    with (
        StageProgress(console, _titles(todo)) as progress,
        nullcontext(side_by_side) if side_by_side else cluster(resources) as at_once,
    ):
        progress.wait_for("workers to start")
        if side_by_side is None and not console.is_terminal:
            console.print("  Ray runs; starting workers, which import torch")

        def observe(records: list[Record]) -> None:
            progress.observe(records)
            record(records)

        scratch = folder / SCRATCH
        return run_sessions(todo, scratch, resources, at_once, observe, keep_going=keep_going)


def _titles(todo: Sequence[Session]) -> dict[str, str]:
    """Title of each artifact: its stage, plus the runs that need it unless all do."""
    everyone = {owner for session in todo for owner in session.owners}

    def title(stage: str, owners: Sequence[str]) -> str:
        if set(owners) == everyone:
            return stage
        return f"{stage} ({', '.join(owners) if len(owners) <= 3 else f'{len(owners)} runs'})"

    return {s.folder.name: title(s.name, each.owners) for each in todo for s in each.stages}


def run_sessions(
    sessions: Sequence[Session],
    scratch: Path,
    resources: Resources,
    side_by_side: int,
    observe: Emit,
    *,
    keep_going: bool = False,
) -> list[StageFailed]:
    """Run every session after those it depends on, at most `side_by_side` at a time.

    `scratch` is a folder for Ray Train's own files, shared by all nodes. It is removed afterwards.

    Returns the failures. After the first failure, running sessions finish and no other starts; with
    `keep_going`, only sessions that need the failed one are skipped. An exception, such as an
    interrupt, cancels running sessions. Raises `StageFailed` if the mailbox is lost.
    """
    # On the driver's node, so that losing a worker node does not lose records and sessions.
    mailbox = Mailbox.options(scheduling_strategy=here()).remote()  # type: ignore[attr-defined]
    waiting = {session.name: session for session in sessions}
    run = _Sessions(waiting, scratch, resources, side_by_side, observe, keep_going, mailbox)
    try:
        if any(session.train for session in sessions):
            run.start_group(train=True)  # Takes seconds; rows can be prepared meanwhile.
        while run.waiting or run.queued or run.groups:
            run.queue_ready()
            run.start_groups()
            run.end_unneeded()
            run.poll()
    except ray.exceptions.RayError as error:  # Without the mailbox, the cause is unknown.
        session = next(iter(run.queued.values()), sessions[-1])
        raise run.failure(session, error) from error
    finally:
        for ref in run.groups:
            ray.cancel(ref)
        shutil.rmtree(scratch, ignore_errors=True)
    return run.failures


@dataclass(frozen=True)
class _Group:
    name: str
    train: bool


@dataclass
class _Sessions:
    """The state of one `run_sessions`."""

    waiting: dict[str, Session]
    scratch: Path
    resources: Resources
    most: int
    observe: Emit
    keep_going: bool
    mailbox: Any
    queued: dict[str, Session] = field(default_factory=dict)
    """In the mailbox or running."""
    groups: dict[Any, _Group] = field(default_factory=dict)
    """By the Ray reference that becomes ready when the group ends."""
    running: dict[str, str] = field(default_factory=dict)
    """The session that each group is running."""
    worked: set[str] = field(default_factory=set)
    """Groups that have run a session."""
    started: int = 0
    states: dict[str, Record] = field(default_factory=dict)
    """The last state record of each artifact."""
    failures: list[StageFailed] = field(default_factory=list)
    lost: set[str] = field(default_factory=set)
    """Failed sessions, and sessions that need them."""
    lost_starts: int = 0
    """Groups in a row whose process was lost before it took a session."""
    losses: Counter[tuple[Path, int]] = field(default_factory=Counter)
    """By the place in a session: how often the process of its group was lost there."""
    unneeded: set[str] = field(default_factory=set)
    """Groups that were cancelled while they started."""

    def start_group(self, train: bool) -> None:
        """Start a group, which runs queued sessions of its kind until there are no more."""
        self.started += 1
        group = _Group(f"group {self.started}", train)
        start = run_group.options(scheduling_strategy=here()).remote
        ref = start(group.name, train, self.resources, self.mailbox, self.scratch)
        self.groups[ref] = group

    def queue_ready(self) -> None:
        """Queue the sessions whose inputs exist."""
        unfinished = self.waiting.keys() | self.queued.keys() | self.lost
        for session in [s for s in self.waiting.values() if not s.after & unfinished]:
            # The reference is in a list, so that only the group dereferences it.
            self.mailbox.queue.remote(session.train, session.name, [ray.put(session)])
            self.queued[session.name] = self.waiting.pop(session.name)
        if self.waiting and not self.queued:
            raise RuntimeError(f"sessions wait for each other: {sorted(self.waiting)}")

    def start_groups(self) -> None:
        """Start groups for the queued sessions, up to the number that fits."""
        for train in (True, False):
            wanted = sum(session.train == train for session in self.queued.values())
            alive = sum(group.train == train for group in self.groups.values())
            for _ in range(min(wanted, self.most) - alive):
                self.start_group(train)

    def end_unneeded(self) -> None:
        """End idle groups of a kind once no session of that kind is waiting."""
        for train in (True, False):
            if any(session.train == train for session in self.waiting.values()):
                continue
            self.mailbox.close.remote(train)
            names = {s.name for s in self.queued.values() if s.train == train}
            if names <= set(self.running.values()):
                for ref, group in self.groups.items():
                    if group.train == train and group.name not in self.worked:
                        ray.cancel(ref)  # It may still be starting, which can take long.
                        self.unneeded.add(group.name)

    def poll(self) -> None:
        """Wait briefly, then process what the groups report and which of them ended."""
        ended, _ = ray.wait(list(self.groups), timeout=_POLL_SECONDS)
        records, finished, self.running = ray.get(self.mailbox.take.remote())
        self.worked |= self.running.keys()
        self._see(records)
        if self.running:
            self.lost_starts = 0
        for name in finished:
            self.queued.pop(name, None)
        for ref in ended:
            group, error = self.groups.pop(ref), _error_of(ref)
            session = self.queued.get(self.running.get(group.name, ""))
            if error and not session and group.name not in self.unneeded:
                self.lost_starts += 1
                if self.lost_starts >= LOSSES:
                    session = next(
                        (s for s in self.queued.values() if s.train == group.train), None
                    )
            if error and session:
                is_running = self.running.pop(group.name, None) == session.name
                if not (is_running and self._give_back(group, session, error)):
                    self._fail(session, error)

    def _give_back(self, group: _Group, session: Session, error: Exception) -> bool:
        """Queue a session again whose group's own process was lost; False if it has failed."""
        if isinstance(error, ray.exceptions.RayTaskError):  # The group is there and gave up.
            return False
        if self.failures and not self.keep_going:
            return False  # No session starts any more.
        states = [self.states.get(stage.folder.name, {}) for stage in session.stages]
        if any(record.get("state") == "failed" for record in states):
            return False
        # None is left if the process was lost before it could say so. The next group then does.
        left = [stage for stage in session.stages if not stage.is_complete()]
        place = progress_marker((left or session.stages)[0])
        self.losses[place] += 1
        said: Record = {"state": "lost", "error": why_lost(error)}
        lost: list[Record] = [{"artifact": stage.folder.name, **said} for stage in left[:1]]
        if self.losses[place] == LOSSES:
            failed: Record = {"state": "failed", "traceback": masked(str(error))}
            self._see([{**record, **failed} for record in lost])
            return False
        self._see(lost)
        self.mailbox.give_back.remote(group.name, group.train)
        return True

    def _see(self, records: Sequence[Record]) -> None:
        """Forward records to `observe`, without failures that are consequences of the first one."""
        shown = []
        for record in records:
            artifact = str(record["artifact"])
            if "state" in record:
                if self.states.get(artifact, {}).get("state") == "failed":
                    continue  # Other workers fail as a consequence of the first.
                self.states[artifact] = record
            shown.append(record)
        if shown:
            self.observe(shown)

    def _fail(self, session: Session, error: Exception) -> None:
        self.failures.append(self.failure(session, error))
        self.lost.add(self.queued.pop(session.name).name)
        if not self.keep_going:
            self.mailbox.stop.remote()
            self.waiting = {}
            names = [name for name in self.running.values() if name in self.queued]
            self.queued = {name: self.queued[name] for name in names}
        while hit := {n for n, s in self.waiting.items() if s.after & self.lost} - self.lost:
            self.lost |= hit
        self.waiting = {n: s for n, s in self.waiting.items() if n not in self.lost}

    def failure(self, session: Session, error: Exception) -> StageFailed:
        """The failed stage of a session, with the reason."""
        states = {stage.name: self.states.get(stage.folder.name, {}) for stage in session.stages}
        for stage, record in states.items():
            if record.get("state") == "failed":
                return StageFailed(stage, str(record["error"]), str(record["traceback"]))
        begun = [stage for stage, record in states.items() if record.get("state")]
        unfinished = [s for s in begun if states[s]["state"] != "finished"]
        stage = (unfinished or [session.stages[0].name])[-1]
        return StageFailed(stage, why_lost(error), masked(str(error)))


def _error_of(ref: Any) -> Exception | None:
    """The error that ended a group; None if it ended normally."""
    try:
        ray.get(ref)
    except ray.exceptions.RayError as error:
        return error
    return None
