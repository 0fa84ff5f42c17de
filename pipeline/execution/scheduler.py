"""Run the sessions of a plan on a Ray cluster, as far side by side as it allows."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from rich.console import Console

from pipeline.config.config import Resources
from pipeline.errors import StageFailed
from pipeline.execution.cluster import cluster
from pipeline.execution.failures import why_lost
from pipeline.execution.mailbox import Mailbox
from pipeline.execution.progress import StageProgress
from pipeline.execution.workers import here, run_group
from pipeline.plan.stage import Session
from pipeline.secrets import masked
from pipeline.stages.context import Record

Observe = Callable[[list[Record]], None]
"""Takes records in order: `{"artifact", "state", ...}` or `{"artifact", "step", metric: value}`."""
_POLL_SECONDS = 0.3
_SCRATCH = ".ray-train"


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
    groups = _Groups(scratch, resources, side_by_side)
    waiting = {session.name: session for session in sessions}
    watch = _Watch(observe)
    failures: list[StageFailed] = []
    lost: set[str] = set()
    try:
        if any(session.train for session in sessions):
            groups.start(train=True)  # Takes seconds, meanwhile others can prepare the rows.
        while waiting or groups.by_end:
            groups.give_ready(waiting, lost)
            ended, _ = ray.wait(list(groups.by_end), timeout=_POLL_SECONDS)
            groups.note_finished(watch.read(groups.mailbox))
            for session, error in groups.note_ended(ended):
                if error:
                    failures.append(_failure(session, watch, error))
                    lost.add(session.name)
                    waiting = _without(lost, waiting) if keep_going else {}
                elif keep_going or not failures:
                    waiting[session.name] = session
    except ray.exceptions.RayError as error:  # The mailbox is gone, so nobody can tell.
        session = next(iter(groups.at_work().values()), sessions[-1])
        raise _failure(session, watch, error) from error
    finally:
        for ref in groups.by_end:
            ray.cancel(ref)
        shutil.rmtree(scratch, ignore_errors=True)
    return failures


@dataclass
class _Group:
    name: str
    train: bool
    session: Session | None = None
    """What it is at work on."""
    has_worked: bool = False
    is_ending: bool = False


class _Groups:
    """The worker groups of one `run_sessions`: at most `most` that train, and as many others."""

    def __init__(self, scratch: Path, resources: Resources, most: int) -> None:
        self.scratch, self.resources, self.most = scratch, resources, most
        # Beside the driver, so that a worker's node takes neither records nor who restarts a group.
        self.mailbox = Mailbox.options(scheduling_strategy=here()).remote()  # type: ignore[attr-defined]
        self.by_end: dict[Any, _Group] = {}
        """By the reference that is ready when the group has ended."""
        self.started = 0

    def at_work(self) -> dict[str, Session]:
        """The sessions that groups are at work on, by name."""
        return {g.session.name: g.session for g in self.by_end.values() if g.session}

    def give_ready(self, waiting: dict[str, Session], lost: set[str]) -> None:
        """Give sessions whose inputs are made to groups, as far as there is room."""
        at_work = self.at_work()
        ready = _ready(waiting, waiting.keys() | at_work.keys() | lost)
        if waiting and not ready and not at_work:
            raise RuntimeError(f"sessions wait for each other: {sorted(waiting)}")
        for session in ready:
            if self._give(session):
                del waiting[session.name]
        for group in self._idle():
            self._take_over(group)
        self._end_idle({session.train for session in waiting.values()})

    def _take_over(self, idle: _Group) -> None:
        """Let an idle group do what another one, which is still starting, was given."""
        others = {g.name: g for g in self.by_end.values() if g.session and g.train == idle.train}
        if not others:
            return
        if name := ray.get(self.mailbox.take_back.remote(list(others))):
            session, others[name].session = others[name].session, None
            if session:
                self._give_to(idle, session)

    def _end_idle(self, expected: set[bool]) -> None:
        """End the groups of a kind that no session is to be expected of."""
        for ref, group in self.by_end.items():
            if not group.session and not group.is_ending and group.train not in expected:
                group.is_ending = True
                if group.has_worked:
                    self.mailbox.give.remote(group.name, [])
                else:
                    ray.cancel(ref)  # It may take long to start.

    def _give(self, session: Session) -> bool:
        """Give a session to an idle group of its kind or to a new one; whether there was room."""
        group = next((g for g in self._idle() if g.train == session.train), None)
        if not group:
            if sum(g.train == session.train for g in self.by_end.values()) >= self.most:
                return False
            group = self.start(session.train)
        self._give_to(group, session)
        return True

    def _give_to(self, group: _Group, session: Session) -> None:
        group.session = session
        # In a list, so that only the group's workers unpack it.
        self.mailbox.give.remote(group.name, [ray.put(session)])

    def start(self, train: bool) -> _Group:
        """Start a group, which waits for a session."""
        self.started += 1
        group = _Group(f"group {self.started}", train)
        start = run_group.options(scheduling_strategy=here()).remote
        self.by_end[start(group.name, train, self.resources, self.mailbox, self.scratch)] = group
        return group

    def _idle(self) -> list[_Group]:
        return [g for g in self.by_end.values() if not g.session and not g.is_ending]

    def note_finished(self, names: Sequence[str]) -> None:
        """These groups are done with their sessions."""
        for group in self.by_end.values():
            if group.name in names:
                group.session, group.has_worked = None, True

    def note_ended(self, ended: Sequence[Any]) -> Iterator[tuple[Session, Exception | None]]:
        """Take out groups that ended; the sessions that they did not finish, and why not.

        No error means that the workers were lost before they knew of the session.
        """
        for ref in ended:
            group = self.by_end.pop(ref)
            try:
                ray.get(ref)
                error = None
            except ray.exceptions.RayError as raised:
                error = raised
            if group.session:
                yield group.session, error


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

    def read(self, mailbox: Any) -> list[str]:
        """Read what came; the groups that finished a session."""
        records = []
        sent, finished = ray.get(mailbox.take.remote())
        for record in sent:
            if "state" in record:
                if self.state.get(record["artifact"], {}).get("state") == "failed":
                    continue  # Other workers fail as a consequence of the first.
                self.state[record["artifact"]] = record
            records.append(record)
        if records:
            self.observe(records)
        return list(finished)


def _failure(session: Session, watch: _Watch, error: Exception) -> StageFailed:
    states = {work.name: watch.state.get(work.folder.name, {}) for work in session.works}
    for stage, record in states.items():
        if record.get("state") == "failed":
            return StageFailed(stage, str(record["error"]), str(record["traceback"]))
    begun = ("started", "lost")
    started = [stage for stage, record in states.items() if record.get("state") in begun]
    stage = (started or [session.works[0].name])[-1]
    return StageFailed(stage, why_lost(error), masked(str(error)))
