"""The actor through which the driver and its groups of workers talk.

In a module that imports almost nothing, since its process starts with every run.
"""

from typing import Any

import ray


@ray.remote(num_cpus=0)
class Mailbox:
    """Queues of sessions for the groups, and what the groups report.

    There are two queues: of sessions that need Ray Train workers (`train`), and of the others.
    """

    def __init__(self) -> None:
        self.queues: dict[bool, list[Any]] = {True: [], False: []}
        self.closed: set[bool] = set()
        self.taken: dict[str, list[Any]] = {}
        """Of each group, the sessions it took so far."""
        self.done: dict[str, int] = {}
        """Of each group, how many of those are finished."""
        self.finished: list[str] = []
        self.records: list[dict[str, Any]] = []
        self.failed: set[str] = set()

    def queue(self, train: bool, name: str, session: list[Any]) -> None:
        """Add a session, a reference in a list, so that only the workers dereference it."""
        self.queues[train].append((name, session))

    def close(self, train: bool) -> None:
        """No more sessions come: groups that ask for one are told to end."""
        self.closed.add(train)

    def stop(self) -> None:
        """Drop the sessions that no group took, and end groups after the sessions they run."""
        self.queues = {True: [], False: []}
        self.closed = {True, False}

    def next(self, group: str, train: bool, index: int) -> Any:
        """The session a group runs as its `index`-th, the same for every rank of the group.

        None if there is none yet, an empty list if there will be none.
        """
        taken = self.taken.setdefault(group, [])
        if index == len(taken) and self.queues[train]:
            taken.append(self.queues[train].pop(0))
        if index < len(taken):
            return taken[index][1]
        return [] if train in self.closed else None

    def finish(self, group: str) -> None:
        """A group has finished the session it was running."""
        index = self.number_done(group)
        self.done[group] = index + 1
        self.finished.append(self.taken[group][index][0])

    def number_done(self, group: str) -> int:
        """How many sessions a group has finished."""
        return self.done.get(group, 0)

    def running(self) -> dict[str, str]:
        """The name of the session that each group is running."""
        return {
            group: taken[-1][0]
            for group, taken in self.taken.items()
            if len(taken) > self.number_done(group)
        }

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
        """Whether a stage that makes one of these artifacts has failed."""
        return bool(self.failed & artifacts)
