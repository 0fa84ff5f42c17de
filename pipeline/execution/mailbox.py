"""The actor through which the driver and its worker groups talk.

In a module that imports next to nothing: its process is there from the start of every run.
"""

from typing import Any

import ray


@ray.remote(num_cpus=0)
class Mailbox:
    """Carries sessions from the driver to worker groups, and back what becomes of them."""

    def __init__(self) -> None:
        self.given: dict[str, list[Any]] = {}
        self.begun: dict[str, int] = {}
        self.done: dict[str, int] = {}
        self.finished: list[str] = []
        self.records: list[dict[str, Any]] = []
        self.failed: set[str] = set()

    def give(self, group: str, session: list[Any]) -> None:
        """Give a group its next session, a reference in a list; an empty one ends the group."""
        self.given.setdefault(group, []).append(session)

    def next(self, group: str, index: int) -> Any:
        """The session that a group got as its `index`-th; None while it has none."""
        given = self.given.get(group, [])
        if index >= len(given):
            return None
        self.begun[group] = index + 1
        return given[index]

    def take_back(self, groups: list[str]) -> str | None:
        """Take the last session back from one that has not begun it; which one, if any."""
        for group in groups:
            if len(self.given.get(group, [])) > self.begun.get(group, 0):
                self.given[group].pop()
                return group
        return None

    def finish(self, group: str) -> None:
        """A group tells that it is done with a session."""
        self.done[group] = self.number_done(group) + 1
        self.finished.append(group)

    def number_done(self, group: str) -> int:
        """How many sessions a group is done with."""
        return self.done.get(group, 0)

    def put(self, records: list[dict[str, Any]]) -> None:
        """Add records of stages."""
        self.records += records
        self.failed |= {each["artifact"] for each in records if each.get("state") == "failed"}

    def take(self) -> tuple[list[dict[str, Any]], list[str]]:
        """All records since the last call, and the groups that finished a session."""
        taken = self.records, self.finished
        self.records, self.finished = [], []
        return taken

    def has_failed(self, artifacts: set[str]) -> bool:
        """Whether a stage that makes one of them failed, so far."""
        return bool(self.failed & artifacts)
