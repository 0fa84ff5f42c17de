"""What finished runs leave for the terminal and the report, and how several are put together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class StageRecord:
    """One stage of a run: what it made, how long that took, or that it was there already."""

    name: str
    fingerprint: str
    seconds: float
    reused: bool


@dataclass(frozen=True)
class RunResult:
    """What a finished run leaves for its report.

    `metrics` is the content of `metrics.json`, `importance` that of the importance summary (None
    for methods without), `provenance` versions, git SHA and command.
    """

    metrics: Mapping[str, Any]
    config_yaml: str
    stages: Sequence[StageRecord]
    importance: Mapping[str, Any] | None
    provenance: Mapping[str, str]
    checks: Mapping[str, Mapping[str, Any]] | None = None
    rows: Mapping[str, Mapping[str, Mapping[str, int]]] = field(default_factory=dict)
    """By task and split: how many rows and tokens were used, and rows left out by reason."""


LEFT_OUT = {"too_long": "longer than tasks.max_length", "empty": "without prompt or answer"}
"""Why rows are left out, by the name of the count."""


def left_out(result: RunResult) -> list[str]:
    """A line for every split of which rows were left out."""
    lines = []
    for task, splits in result.rows.items():
        for split, counts in splits.items():
            reasons = [f"{counts[key]} {why}" for key, why in LEFT_OUT.items() if counts[key]]
            if reasons:
                total = counts["rows"] + sum(counts[key] for key in LEFT_OUT)
                lines.append(f"{task}: of {total} {split} rows left out: {', '.join(reasons)}")
    return lines


@dataclass(frozen=True)
class Group:
    """Runs shown as one line or heat map: the seeds of a method."""

    label: str
    runs: Sequence[RunResult]


def labels(runs: Sequence[RunResult]) -> list[str]:
    """Name each run: its method, with its seed where several runs share the method.

    Runs that share method and seed are told apart by a number.
    """
    methods = [str(run.metrics["method"]) for run in runs]
    names = [
        f"{method} seed {run.metrics['seed']}" if methods.count(method) > 1 else method
        for method, run in zip(methods, runs, strict=True)
    ]
    return [
        f"{name} #{names[: i + 1].count(name)}" if names.count(name) > 1 else name
        for i, name in enumerate(names)
    ]


def groups(runs: Sequence[RunResult]) -> list[Group]:
    """Gather the seeds of each method, in order of first appearance.

    A method that has one seed twice ran with different settings: its runs stay apart.
    """
    by_method: dict[str, list[tuple[str, RunResult]]] = {}
    for label, run in zip(labels(runs), runs, strict=True):
        by_method.setdefault(str(run.metrics["method"]), []).append((label, run))
    found = []
    for method, members in by_method.items():
        if len({run.metrics["seed"] for _, run in members}) == len(members):
            found.append(Group(method, [run for _, run in members]))
        else:
            found += [Group(label, [run]) for label, run in members]
    return found


def evaluation_sets(metrics: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """Give the metrics of every evaluation set of a run, by the set's name."""
    return metrics.get("evaluation_sets") or {metrics.get("evaluation_set", "score"): metrics}


def values(group: Group, evaluation_set: str, key: str) -> dict[int, float]:
    """A metric of every run of a group that has it, by seed; `forgetting` is its mean."""
    found = {}
    for run in group.runs:
        of_set = evaluation_sets(run.metrics).get(evaluation_set)
        if of_set is None:
            continue
        value = of_set[key]["mean"] if key == "forgetting" else of_set[key]
        if value is not None:
            found[int(run.metrics["seed"])] = float(value)
    return found
