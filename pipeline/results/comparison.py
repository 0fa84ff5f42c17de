"""Statistics over seeds: means with confidence intervals, and paired differences of methods."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from pipeline.config.naming import CHANGES
from pipeline.config.presets import BOUNDS, METHODS
from pipeline.results.results import MethodRuns, RunResult, base_measures, runs_by_method, values

CONFIDENCE = 0.95
BASELINE = "sequential"
COMPARED = "average_performance"
"""The metric whose differences are reported."""


@dataclass(frozen=True)
class Mean:
    """A mean over seeds."""

    mean: float
    half_width: float | None
    """Half the width of the 95% confidence interval; None for one seed."""


@dataclass(frozen=True)
class Line:
    """One method's line in the table of an evaluation set."""

    group: MethodRuns
    metrics: Mapping[str, Mean]
    """By metric, without metrics that the method does not have."""
    differences: Mapping[str, Mean]
    """Average performance minus that of `sequential` and of each control, by their names."""


def is_bound(label: str) -> bool:
    """Whether a method is an upper bound, also with settings of its own (`joint+changes`)."""
    return label.removesuffix(CHANGES) in BOUNDS


def compare(runs: Sequence[RunResult], evaluation_set: str, metrics: Sequence[str]) -> list[Line]:
    """One line per method that has the evaluation set, in order of first appearance."""
    by_label = {group.label: group for group in runs_by_method(runs)}
    compared = {label: values(of, evaluation_set, COMPARED) for label, of in by_label.items()}
    lines = []
    for label, group in by_label.items():
        found = {key: values(group, evaluation_set, key) for key in metrics}
        estimates = {key: mean_of(list(of.values())) for key, of in found.items() if of}
        if compared[label]:
            lines.append(Line(group, estimates, _differences(label, compared)))
    return lines


def _differences(label: str, compared: Mapping[str, Mapping[int, float]]) -> dict[str, Mean]:
    """Differences paired by seed, over the seeds that both methods have."""
    own, preset = compared[label], METHODS.get(label.removesuffix(CHANGES))
    differences = {}
    for reference in (BASELINE, *(preset.controls if preset else ())):
        # The file's changes to a method are also changes to its controls.
        theirs = compared.get(reference, compared.get(f"{reference}{CHANGES}", {}))
        pairs = [own[seed] - theirs[seed] for seed in own if seed in theirs]
        if pairs and reference != label:
            differences[reference] = mean_of(pairs)
    return differences


def compare_base(runs: Sequence[RunResult]) -> dict[str, dict[str, list[Mean]]]:
    """What the base model still knows, by measure and method: the base, then after every task."""
    found: dict[str, dict[str, list[Mean]]] = {}
    for group in runs_by_method(runs):
        of_seeds = [base_measures(run) for run in group.runs]
        for measure in dict.fromkeys(key for of in of_seeds for key in of):
            rows = zip(*(of[measure] for of in of_seeds if measure in of), strict=True)
            found.setdefault(measure, {})[group.label] = [mean_of(row) for row in rows]
    return found


def mean_of(sample: Sequence[float]) -> Mean:
    """Mean of independent values, with Student's t interval."""
    if len(sample) == 1:
        return Mean(sample[0], None)
    from scipy.stats import t  # The import takes half a second.

    quantile = float(t.ppf((1 + CONFIDENCE) / 2, len(sample) - 1))
    return Mean(fmean(sample), quantile * stdev(sample) / len(sample) ** 0.5)
