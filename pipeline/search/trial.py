"""Trials of a search: what is recorded of each, how they compare, and which is the best."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import pyarrow as pa
from agcl.metrics import Matrix

from pipeline.storage.artifact import write_json

_SCHEMA = pa.schema(
    [
        ("trial", pa.int32()),
        ("state", pa.string()),
        ("task", pa.int32()),
        *((name, pa.float64()) for name in ("average", "learned", "retained", "seconds")),
        ("reason", pa.string()),
    ]
)
State = Literal["running", "finished", "stopped", "failed"]
RECORD = "trial.json"


@dataclass(frozen=True)
class Progress:
    """How a trial stands after a task: means over evaluation sets, on validation rows."""

    average: float
    """Of the tasks so far, the mean score now."""
    learned: float
    """Of the tasks so far, the mean score right after each was trained."""
    retained: float | None
    """Of the tasks before the last one trained, the mean score now; None after the first."""


@dataclass(frozen=True)
class Trial:
    """One point of the search space and what came of it."""

    number: int
    """From 0, in the order in which points were chosen."""
    settings: Mapping[str, Any]
    """By dotted config key; empty for the config as it is."""
    state: State = "running"
    """`stopped` is ended early because others were better."""
    progress: tuple[Progress, ...] = ()
    """After every task so far."""
    seconds: float = 0.0
    """Time that its stages took when they were computed, without those that all trials share."""
    reason: str | None = None
    """Why it failed."""

    @property
    def last(self) -> Progress | None:
        """How it stands, or ended; None before the first task."""
        return self.progress[-1] if self.progress else None

    def save(self, folder: Path) -> None:
        """Write it into its folder, whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / RECORD, asdict(self))


def load(folder: Path) -> Trial | None:
    """The trial of a folder; None where there is none that can be read."""
    try:
        raw = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        progress = tuple(Progress(**entry) for entry in raw.pop("progress"))
        return Trial(progress=progress, **raw)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def progress_after(
    rows: Sequence[Mapping[str, Mapping[str, float]]], tasks: Sequence[str]
) -> Progress:
    """How a trial stands after its last task so far.

    `rows` are the scores by task and evaluation set, of the base model and after every task so far.
    """
    num_done = len(rows) - 1
    matrices: list[Matrix] = [
        [[row[task][name] for task in tasks] for row in rows]
        for name in rows[0][tasks[0]]
        if all(name in rows[0][task] for task in tasks)
    ]
    return Progress(
        average=fmean(fmean(m[-1][:num_done]) for m in matrices),
        learned=fmean(fmean(m[i + 1][i] for i in range(num_done)) for m in matrices),
        retained=fmean(fmean(m[-1][: num_done - 1]) for m in matrices) if num_done > 1 else None,
    )


def best(trials: Sequence[Trial]) -> Trial | None:
    """The finished trial of the highest average, the first of equals."""
    finished = [trial for trial in trials if trial.state == "finished" and trial.last]
    return max(finished, key=lambda t: (_last(t).average, -t.number), default=None)


def pareto_front(trials: Sequence[Trial]) -> list[Trial]:
    """The finished trials that no other one beats in what is retained and what is learned."""
    finished = [
        t for t in trials if t.state == "finished" and t.last and t.last.retained is not None
    ]

    def sides(trial: Trial) -> tuple[float, float]:
        return _last(trial).retained or 0.0, _last(trial).learned

    def is_beaten(one: Trial) -> bool:
        mine = sides(one)
        return any(
            theirs != mine and all(t >= m for t, m in zip(theirs, mine, strict=True))
            for theirs in map(sides, finished)
        )

    return [trial for trial in finished if not is_beaten(trial)]


def table(trials: Sequence[Trial]) -> pa.Table:
    """One row a trial: number, state, task reached, scores, seconds, reason, and its settings."""
    found = pa.Table.from_pylist(
        [
            {
                "trial": trial.number,
                "state": trial.state,
                "task": len(trial.progress),
                **(asdict(trial.last) if trial.last else dict.fromkeys(Progress.__annotations__)),
                "seconds": trial.seconds,
                "reason": trial.reason,
            }
            for trial in trials
        ],
        schema=_SCHEMA,
    )
    for key in dict.fromkeys(key for trial in trials for key in trial.settings):
        found = found.append_column(key, _column([trial.settings.get(key) for trial in trials]))
    return found


def _column(values: Sequence[Any]) -> pa.Array:
    """Numbers as they are; text where not all of them are of one kind."""
    kinds = {type(value) for value in values if value is not None}
    if len(kinds) > 1 and not kinds <= {int, float}:
        values = [None if value is None else str(value) for value in values]
    return pa.array(values, pa.float64() if kinds == {int, float} else None)


def ended(trial: Trial, state: State, reason: str | None = None) -> Trial:
    """The trial in its last state."""
    return replace(trial, state=state, reason=reason)


def _last(trial: Trial) -> Progress:
    assert trial.last is not None
    return trial.last
