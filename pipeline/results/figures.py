"""The figures of a report as SVG; the report embeds them and MLflow gets them as artifacts.

Seeds of a method are drawn together: heat maps show their mean, curve panels their mean and each
seed as a thin line. Figures are drawn without pyplot, which is not thread-safe.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.results.checks import directions
from pipeline.results.comparison import Mean, compare, compare_base, is_bound
from pipeline.results.drawing import (
    GREY,
    STYLE,
    Array,
    Styles,
    curve_panels,
    draw_curve,
    fitted,
    legend_panels,
    styles_of,
    svg,
    tip,
)
from pipeline.results.heat_maps import accuracy_matrix, directions_taken, importances, overlaps
from pipeline.results.results import (
    LOWER_IS_BETTER,
    MethodRuns,
    RunResult,
    base_measures,
    base_title,
    entry_importances,
    evaluation_sets,
    runs_by_method,
)

LEARNED, KEPT = "learning_accuracy", "average_performance"
LEARNED_LABEL = "learning accuracy: mean score right after training"
_LEAST_SPAN = 0.1  # of the vertical axes of what the base model still knows
Points = Mapping[str, tuple[Mean, Mean]]
"""Learned and kept by method."""


@dataclass(frozen=True)
class Picture:
    """A figure as SVG, and its place in the report."""

    file: str
    section: str
    label: str
    """The group that it shows; empty for all groups."""
    evaluation_set: str
    """Empty if it does not depend on one."""
    svg: str


def draw(runs: Sequence[RunResult]) -> list[Picture]:
    """Draw all figures of these runs, with unique file names."""
    pictures: list[Picture] = []
    with matplotlib.rc_context(STYLE):
        for section, label, name, figure in _figures(runs):
            parts = (re.sub(r"[^\w.]+", "-", part).strip("-") for part in (section, label, name))
            slug = "-".join(part for part in parts if part)
            taken = any(picture.file == f"{slug}.svg" for picture in pictures)
            file = f"{slug}-{len(pictures)}.svg" if taken else f"{slug}.svg"
            pictures.append(Picture(file, section, label, name, svg(figure, file)))
    return pictures


def _figures(runs: Sequence[RunResult]) -> Iterator[tuple[str, str, str, Figure]]:
    """Figures with their section, group and evaluation set."""
    tasks = [str(name) for name in runs[0].metrics["tasks"]]
    by_method = runs_by_method(runs)
    styles = styles_of([group.label for group in by_method])
    for name in evaluation_sets(runs):
        matrices = {of.label: found for of in by_method if (found := _matrices(of, name))}
        yield "forgetting", "", name, _forgetting(tasks, matrices, styles)
        points = {
            line.group.label: (line.metrics[LEARNED], line.metrics[KEPT])
            for line in compare(runs, name, (LEARNED, KEPT))
        }
        if len(points) > 1:
            yield "stability-plasticity", "", name, _stability_plasticity(points, styles)
        for label, members in matrices.items():
            title = label + (f", mean of {len(members)} seeds" if len(members) > 1 else "")
            yield "accuracy", label, name, accuracy_matrix(tasks, np.mean(members, axis=0), title)
    if curves := _base_curves(by_method):
        yield "base", "", "", _base(curves, styles)
        if figure := _base_against_learned(runs, styles):
            yield "base-learned", "", "", figure
    if losses := _losses(by_method):
        yield "training", "", "", _training(losses, styles)
    shares = {group.label: taken for group in by_method if (taken := directions(group))}
    if shares:
        yield "directions", "", "", directions_taken(shares)
    yield from _importances(by_method)


def _importances(by_method: Sequence[MethodRuns]) -> Iterator[tuple[str, str, str, Figure]]:
    """Figures of the groups that collected importances of single weight entries."""
    for group in by_method:
        if summaries := entry_importances(group):
            attributed = [str(name) for name in summaries[0]["tasks"]]
            yield "importance", group.label, "", importances(attributed, summaries, group.label)
            if len(attributed) > 1:
                by_seed = np.array([summary["overlap"] for summary in summaries], dtype=float)
                overlap = by_seed.mean(axis=0)
                yield "overlap", group.label, "", overlaps(attributed, overlap, group.label)


def _matrices(group: MethodRuns, evaluation_set: str) -> list[Array]:
    """Accuracy matrices of the runs that have the evaluation set."""
    sets = [run.metrics["evaluation_sets"].get(evaluation_set) for run in group.runs]
    return [np.array(of_set["accuracy_matrix"], dtype=float) for of_set in sets if of_set]


def _base_curves(by_method: Sequence[MethodRuns]) -> dict[str, dict[str, list[Array]]]:
    """One curve per seed, by measure of what the base model still knows and method."""
    curves: dict[str, dict[str, list[Array]]] = {}
    for group in by_method:
        for run in group.runs:
            for measure, values in base_measures(run).items():
                of_measure = curves.setdefault(measure, {})
                of_measure.setdefault(group.label, []).append(np.array(values, dtype=float))
    return curves


def _forgetting(
    tasks: Sequence[str], matrices: Mapping[str, Sequence[Array]], styles: Styles
) -> Figure:
    """One panel per task, after a panel with the mean over the tasks trained so far."""
    count = len(tasks) + (len(tasks) > 1)
    figure, panels = curve_panels(count, list(matrices), styles)
    if len(tasks) > 1:
        axes = panels.pop(0)
        axes.set_title("mean of tasks so far", fontweight="bold")
        for label, members in matrices.items():
            so_far = [np.array([m[t, :t].mean() for t in range(1, len(m))]) for m in members]
            draw_curve(axes, np.arange(1, len(tasks) + 1), so_far, label, styles)
    for t, (axes, name) in enumerate(zip(panels, tasks, strict=True)):
        axes.set_title(fitted(f"{t + 1} {name}", 20))
        axes.axvline(t + 1, color=GREY, linewidth=0.8, linestyle=":")
        for label, members in matrices.items():
            before = np.mean([m[: t + 2, t] for m in members], axis=0)
            dotted = {**styles[label], "marker": "", "linestyle": ":"}
            axes.plot(np.arange(t + 2), before, linewidth=0.8, **dotted)
            after = [m[t + 1 :, t] for m in members]
            draw_curve(axes, np.arange(t + 1, len(tasks) + 1), after, label, styles)
    return figure


def _stability_plasticity(points: Points, styles: Styles) -> Figure:
    figure = Figure((7.2, 4.2))
    axes = figure.subplots()
    _against_learned(axes, points, styles, "average")
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=":")
    low = min(min(x.mean, y.mean) for x, y in points.values())
    axes.set(xlim=(max(0, low - 0.1), 1.03), ylim=(max(0, low - 0.1), 1.03))
    axes.set_xlabel(LEARNED_LABEL)
    axes.set_ylabel("average: mean score at the end")
    figure.legend(loc="outside right upper", fontsize=7.5)
    return figure


def _against_learned(axes: Axes, points: Points, styles: Styles, kept: str) -> None:
    """Learned versus kept, with confidence intervals for methods with several seeds."""
    for label, (learned, value) in points.items():
        drawn = axes.errorbar(
            learned.mean, value.mean, xerr=learned.half_width, yerr=value.half_width,
            **styles[label], markersize=6, linestyle="", elinewidth=0.7,
            markerfacecolor="none" if is_bound(label) else None, label=fitted(label, 24),
        )  # fmt: skip
        text = f"{label}: learning accuracy {learned.mean:.3f}, {kept} {value.mean:.3f}"
        drawn.lines[0].set_gid(tip(text))
    axes.grid(visible=True)


def _base_against_learned(runs: Sequence[RunResult], styles: Styles) -> Figure | None:
    """What the base model still knows at the end versus learned, a panel per measure.

    Shows the measures that at least two methods have; None if there are none. A loss has its axis
    inverted: up is better.
    """
    learned = {
        line.group.label: line.metrics[LEARNED]
        for line in compare(runs, runs[0].metrics["evaluation_set"], (LEARNED,))
    }
    base = {
        measure: {label: rows for label, rows in by_label.items() if label in learned}
        for measure, by_label in compare_base(runs).items()
    }
    base = {measure: by_label for measure, by_label in base.items() if len(by_label) > 1}
    if not base:
        return None
    labels = [label for label in learned if any(label in by_label for by_label in base.values())]
    figure, panels = legend_panels(len(base), labels, styles, sharey=False)
    for axes, (measure, by_label) in zip(panels, base.items(), strict=True):
        title, is_loss = base_title(measure), measure in LOWER_IS_BETTER
        points = {label: (learned[label], rows[-1]) for label, rows in by_label.items()}
        _against_learned(axes, points, styles, title)
        before = fmean(rows[0].mean for rows in by_label.values())
        axes.axhline(
            before, color=GREY, linewidth=0.8, linestyle=":", gid=tip(f"base: {before:.3f}")
        )
        shown = [before, *(y.mean for _, y in points.values())]
        margin = max(0.1 * (max(shown) - min(shown)), 0.01)
        low, high = min(shown) - margin, max(shown) + margin
        axes.set_ylim((high, low) if is_loss else (low, high))
        unit = "nats, axis inverted" if is_loss else ""
        unit = "acc_norm" if measure.startswith("probes") else unit
        axes.set_title(fitted(title, 26) + (f" ({unit})" if unit else ""))
    lowest = min(learned[label].mean for label in labels)
    panels[0].set_xlim(max(0, lowest - 0.1), 1.03)  # The panels share their axis.
    figure.supxlabel(LEARNED_LABEL)
    figure.supylabel("base kept, at the end")
    return figure


def _base(base: Mapping[str, Mapping[str, Sequence[Array]]], styles: Styles) -> Figure:
    """A panel per measure, each with its own scale."""
    order = list(dict.fromkeys(label for by_label in base.values() for label in by_label))
    figure, panels = legend_panels(len(base), order, styles, sharey=False)
    for axes, (measure, by_label) in zip(panels, base.items(), strict=True):
        is_loss = measure in LOWER_IS_BETTER
        axes.set_title(fitted(base_title(measure), 26) + ", lower is better" * is_loss)
        for label, members in by_label.items():
            draw_curve(axes, np.arange(len(members[0])), members, label, styles)
        low, high = axes.get_ylim()
        # A narrower scale would show a few rows' change as a collapse.
        missing = max(0.0, _LEAST_SPAN - (high - low)) / 2
        axes.set_ylim(low - missing, high + missing)
    figure.supxlabel("tasks trained (0 = base model)")
    return figure


def _losses(by_method: Sequence[MethodRuns]) -> dict[str, dict[str, list[Array]]]:
    """Points (step, loss) of every seed, by train stage and method."""
    found: dict[str, dict[str, list[Array]]] = {}
    for group in by_method:
        for run in group.runs:
            for stage, points in run.losses.items():
                of_stage = found.setdefault(stage.partition("/")[2], {})
                of_stage.setdefault(group.label, []).append(np.array(points, dtype=float))
    return found


def _training(losses: Mapping[str, Mapping[str, Sequence[Array]]], styles: Styles) -> Figure:
    """Training loss by step, a panel per stage and a line per seed."""
    order = list(dict.fromkeys(label for of_stage in losses.values() for label in of_stage))
    figure, panels = legend_panels(len(losses), order, styles)
    panels[0].set_yscale("log")  # The panels share their axes.
    for axes, (stage, by_label) in zip(panels, losses.items(), strict=True):
        axes.set_title(fitted(stage, 30))
        for label, members in by_label.items():
            for points in members:
                steps, values = points.T
                text = f"{label}: from {values[0]:.3g} to {values[-1]:.3g} at step {steps[-1]:.0f}"
                color = styles[label]["color"]
                axes.plot(steps, values, color=color, linewidth=1, alpha=0.8, gid=tip(text))
    figure.supxlabel("step")
    figure.supylabel("training loss")
    return figure
