"""The log of a running stage: a file in its artifact, and records for the driver."""

import json
import time
from collections import deque
from pathlib import Path

from pipeline.stages.context import Emit, Record

_PACE_STEPS = 20
"""Last steps by whose pace the time left is estimated."""
_SEND_SECONDS = 0.5
"""Between two deliveries of records."""


class StageLog:
    """Metrics of one stage: written to a JSON-lines file in its artifact and sent while it runs.

    Only rank 0 has one.
    """

    def __init__(self, name: str, file: Path, emit: Emit) -> None:
        self.name, self.emit = name, emit
        self.lines = file.open("a", encoding="utf-8")
        self.waiting: list[Record] = []
        self.started = self.sent = time.monotonic()
        self.recent: deque[tuple[int, float]] = deque(maxlen=_PACE_STEPS)

    def __call__(self, metrics: dict[str, float], step: int) -> None:
        """Record metrics of one step, with `seconds` since the stage started."""
        now = time.monotonic()
        self.recent.append((step, now))
        line = {"step": step, **metrics, "seconds": round(now - self.started, 4)}
        if (total := metrics.get("of_steps")) and (left := self._seconds_left(total)) is not None:
            line["seconds_left"] = round(left, 1)
        self.lines.write(json.dumps(line) + "\n")
        self.waiting.append({"artifact": self.name, **line})
        if now - self.sent >= _SEND_SECONDS:
            self._send()

    def _seconds_left(self, total: float) -> float | None:
        """By the pace of the last steps; None after the first one."""
        (first, since), (last, now) = self.recent[0], self.recent[-1]
        return (total - last) * (now - since) / (last - first) if last > first else None

    def _send(self) -> None:
        self.lines.flush()
        self.emit(self.waiting)
        self.waiting, self.sent = [], time.monotonic()

    def close(self) -> None:
        """Send pending records and close the file."""
        if self.waiting:
            self._send()
        self.lines.close()
