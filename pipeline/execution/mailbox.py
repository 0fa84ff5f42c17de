"""The actor through which the driver and its groups of workers communicate.

This module imports almost nothing, because every run starts a process for it.
"""

from collections import Counter
from typing import Any

import ray


@ray.remote(num_cpus=0)
class Mailbox:
    """Queues of sessions for the groups, and the records that the groups report.

    There are two queues: one for sessions that need Ray Train workers (`train`), one for others.
    """

    def __init__(self) -> None:
        self.queues: dict[bool, list[Any]] = {True: [], False: []}
        self.closed: set[bool] = set()
        self.taken: dict[str, list[Any]] = {}
        """By group: the sessions it has taken so far."""
        self.done: Counter[str] = Counter()
        """By group: how many of those are finished."""
        self.lost: set[str] = set()
        """Groups whose own process was lost."""
        self.finished: list[str] = []
        self.records: list[dict[str, Any]] = []
        self.failed: set[str] = set()

    def queue(self, train: bool, name: str, session: list[Any]) -> None:
        """Add a session as a reference in a list, so that only the workers dereference it."""
        self.queues[train].append((name, session))

    def close(self, train: bool) -> None:
        """Declare the queue complete: groups that find it empty end."""
        self.closed.add(train)

    def stop(self) -> None:
        """Drop the queued sessions, and end each group after the session it is running."""
        self.queues = {True: [], False: []}
        self.closed = {True, False}

    def next(self, group: str, train: bool, index: int) -> Any:
        """The `index`-th session of a group, the same for every rank of the group.

        None if there is no session yet, an empty list if there will never be one.
        """
        if group in self.lost:
            return []  # Ray is still ending its workers.
        taken = self.taken.setdefault(group, [])
        if index == len(taken) and self.queues[train]:
            taken.append(self.queues[train].pop(0))
        if index < len(taken):
            return taken[index][1]
        return [] if train in self.closed else None

    def finish(self, group: str) -> None:
        """Record that a group has finished the session it was running."""
        self.finished.append(self.taken[group][self.done[group]][0])
        self.done[group] += 1

    def give_back(self, group: str, train: bool) -> None:
        """Queue the session again that a group was running whose own process was lost."""
        self.lost.add(group)
        if len(self.taken[group]) > self.done[group]:
            self.queues[train].insert(0, self.taken[group].pop())

    def number_done(self, group: str) -> int:
        """How many sessions a group has finished."""
        return self.done[group]

    def running(self) -> dict[str, str]:
        """The name of the session that each group is running."""
        return {g: taken[-1][0] for g, taken in self.taken.items() if len(taken) > self.done[g]}

    def put(self, records: list[dict[str, Any]]) -> None:
        """Add records of stages."""
        self.records += records
        self.failed |= {each["artifact"] for each in records if each.get("state") == "failed"}

    def take(self) -> tuple[list[dict[str, Any]], list[str], dict[str, str]]:
        """New records, names of newly finished sessions, and what is running."""
        taken = self.records, self.finished, self.running()
        self.records, self.finished = [], []
        return taken

    def has_failed(self, artifacts: set[str]) -> bool:
        """Whether a stage has failed that makes one of these artifacts."""
        return bool(self.failed & artifacts)
