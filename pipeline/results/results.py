"""The result of a finished run, and how the results of several runs are named and grouped."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any


@dataclass(frozen=True)
class StageRecord:
    """One stage of a run."""

    name: str
    fingerprint: str
    seconds: float
    """How long the stage took when it was computed, by this run or an earlier one."""
    reused: bool


@dataclass(frozen=True)
class RunResult:
    """What a finished run passes to the terminal, the report and the model card."""

    metrics: Mapping[str, Any]
    """Content of `metrics.json`."""
    config_yaml: str
    stages: Sequence[StageRecord]
    importance: Mapping[str, Any] | None
    """Content of `importance.json`; None for methods without attribution."""
    provenance: Mapping[str, str]
    """Command, git commit, package versions and seed."""
    checks: Mapping[str, Mapping[str, Any]] | None = None
    """Content of `checks.json`; None for methods without protection."""
    rows: Mapping[str, Mapping[str, Mapping[str, int]]] = field(default_factory=dict)
    """By task and split: rows and tokens used, and rows left out by reason."""
    weights: int | None = None
    """Number of weights of the base model; None if its files are not on this machine."""
    finished: float | None = None
    """When the last stage was finished, in seconds since 1970."""
    examples: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    """By task: some scored rows with the model's answers, see `examples.examples`."""
    losses: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    """By train stage: step and loss, thinned out."""


METRIC_TITLES = {
    "average_performance": "Average",
    "backward_transfer": "Backward transfer",
    "learning_accuracy": "Learning accuracy",
    "forgetting": "Forgetting",
    "average_incremental_performance": "Incremental average",
    "forward_transfer": "Forward transfer",
}
"""Metrics of an evaluation set, in the order in which they are shown. The terminal, the report and
MLflow all use these titles."""


BASE_TITLES = {
    "facts": "facts",
    "text_loss": "text loss",
    "kl": "KL (text)",
    "kl_answers": "KL (answers)",
}
"""Measures of what the base model still knows; a probe `probes/<name>` is shown by its name."""
LOWER_IS_BETTER = {"forgetting", "text_loss", "kl", "kl_answers"}


def base_title(measure: str) -> str:
    """The name by which tables and figures show a measure of `base_measures`."""
    if measure == "probes":
        return "mean of probes"
    return BASE_TITLES.get(measure, measure.removeprefix("probes/"))


def base_measures(run: RunResult) -> dict[str, list[float]]:
    """What the base model still knows: by measure, a number per row of the accuracy matrix.

    Probes (`probes/<name>`) come with their acc_norm, and several of them with their mean first.
    Text loss and KL are in nats per token.
    """
    block = run.metrics.get("base", {})
    probes = {f"probes/{name}": values for name, values in block.get("probes", {}).items()}
    found: dict[str, list[float]] = {}
    if len(probes) > 1:
        found["probes"] = [fmean(row) for row in zip(*probes.values(), strict=True)]
    return found | probes | {key: block[key] for key in BASE_TITLES if key in block}


def metric_name(key: str) -> str:
    """A metric's title as one lowercase word, as MLflow and tables in files name it."""
    return METRIC_TITLES[key].lower().replace(" ", "_")


LEFT_OUT = {
    "too_long": "longer than tasks.max_length or the model allows",
    "empty": "without prompt or answer",
}
"""Reasons for leaving out rows, by the name of their count."""
_CUT = "cut at the beginning of their prompts to tasks.max_length or what the model allows"


def left_out(rows: Mapping[str, Mapping[str, Mapping[str, int]]]) -> list[str]:
    """One line for each split that lost rows, with the reasons, and for each with cut rows.

    Takes counts by task and split.
    """
    lines = []
    for task, splits in rows.items():
        for split, counts in splits.items():
            reasons = [f"{counts[key]} {why}" for key, why in LEFT_OUT.items() if counts[key]]
            if reasons:
                lost = sum(counts[key] for key in LEFT_OUT)
                total = f"{counts['rows'] + lost} {split} rows"
                lines.append(f"{task}: {lost} of {total} left out: {', '.join(reasons)}")
            if cut := counts.get("truncated", 0):
                lines.append(f"{task}: {cut} of {counts['rows']} {split} rows {_CUT}")
    return lines


@dataclass(frozen=True)
class MethodRuns:
    """Runs shown as one line or heat map: the seeds of a method."""

    label: str
    runs: Sequence[RunResult]


def labels(runs: Sequence[RunResult]) -> list[str]:
    """Name each run by its method, and by its seed if several runs share the method.

    Runs with the same method and seed are numbered.
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


def runs_by_method(runs: Sequence[RunResult]) -> list[MethodRuns]:
    """Group the runs by method, in order of first appearance.

    If a method has two runs with the same seed, they differ in their settings: averaging them
    would be wrong, so each run of that method forms its own group.
    """
    by_method: dict[str, list[tuple[str, RunResult]]] = {}
    for label, run in zip(labels(runs), runs, strict=True):
        by_method.setdefault(str(run.metrics["method"]), []).append((label, run))
    found = []
    for method, members in by_method.items():
        if len({run.metrics["seed"] for _, run in members}) == len(members):
            found.append(MethodRuns(method, [run for _, run in members]))
        else:
            found += [MethodRuns(label, [run]) for label, run in members]
    return found


def evaluation_sets(runs: Sequence[RunResult]) -> list[str]:
    """Names of all evaluation sets of these runs, the main set of the first run first."""
    names = (name for run in runs for name in run.metrics["evaluation_sets"])
    return list(dict.fromkeys([runs[0].metrics["evaluation_set"], *names]))


def metric(of_set: Mapping[str, Any], key: str) -> float | None:
    """Look up a metric of an evaluation set; `forgetting` is averaged over tasks."""
    value = of_set[key]["mean"] if key == "forgetting" else of_set[key]
    return None if value is None else float(value)


def values(group: MethodRuns, evaluation_set: str, key: str) -> dict[int, float]:
    """Look up a metric by seed, without runs that do not have the evaluation set or metric."""
    sets = {int(run.metrics["seed"]): run.metrics["evaluation_sets"] for run in group.runs}
    found = {s: metric(of[evaluation_set], key) for s, of in sets.items() if evaluation_set in of}
    return {seed: value for seed, value in found.items() if value is not None}


def entry_importances(group: MethodRuns) -> list[Mapping[str, Any]]:
    """Importance summaries of the runs that collected importances of single weight entries."""
    summaries = [run.importance or {} for run in group.runs]
    return [summary for summary in summaries if "by_layer_and_module" in summary]
