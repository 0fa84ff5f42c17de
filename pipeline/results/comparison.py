"""What the seeds of several methods say: means with intervals, and paired differences."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from pipeline.config.presets import METHODS
from pipeline.results.results import Group, RunResult, groups, values

CONFIDENCE = 0.95
BASELINE = "sequential"
BOUNDS = ("joint", "solo")
"""Methods that no sequence allows: what could be kept and what could be learned at best."""
COMPARED = "average_performance"
"""The metric that differences are taken of."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds."""

    mean: float
    half_width: float | None
    """Of the interval that holds the true mean with 95 % confidence; None for one seed."""
    seeds: int

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.half_width is not None and abs(self.mean) > self.half_width


@dataclass(frozen=True)
class Line:
    """A method's line of the table."""

    group: Group
    metrics: Mapping[str, Estimate]
    """By metric; without those that the method does not have."""
    differences: Mapping[str, Estimate]
    """Average performance minus that of `sequential` and of the method's controls, by method."""


def compare(runs: Sequence[RunResult], evaluation_set: str, metrics: Sequence[str]) -> list[Line]:
    """Give every method that has the evaluation set its line, in order of first appearance.

    A difference is paired: taken seed by seed, over the seeds that both methods have.
    """
    by_label = {group.label: group for group in groups(runs)}
    lines = []
    for label, group in by_label.items():
        own = values(group, evaluation_set, COMPARED)
        if not own:
            continue
        found = {key: values(group, evaluation_set, key) for key in metrics}
        differences = {}
        for reference in (BASELINE, *(METHODS[label].controls if label in METHODS else ())):
            if reference in by_label and reference != label:
                theirs = values(by_label[reference], evaluation_set, COMPARED)
                pairs = [own[seed] - theirs[seed] for seed in own if seed in theirs]
                if pairs:
                    differences[reference] = estimate(pairs)
        lines.append(
            Line(
                group,
                {key: estimate(list(of.values())) for key, of in found.items() if of},
                differences,
            )
        )
    return lines


def estimate(sample: Sequence[float]) -> Estimate:
    """The mean of independent values with Student's t interval."""
    if len(sample) == 1:
        return Estimate(sample[0], None, 1)
    from scipy.stats import t  # Half a second, and only here.

    quantile = float(t.ppf((1 + CONFIDENCE) / 2, len(sample) - 1))
    return Estimate(fmean(sample), quantile * stdev(sample) / len(sample) ** 0.5, len(sample))
