"""The figures of a report, as PNG bytes; the report embeds them and the tracker logs them.

Runs of one method with different seeds are drawn as one: heat maps show their mean, curves their
mean with every seed as a thin line. Everything is drawn through matplotlib's objects, without
pyplot, so any thread of any process may call this.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from pipeline.results.comparison import BOUNDS, Estimate, compare
from pipeline.results.drawing import (
    GREY,
    INK,
    Array,
    colour_bar,
    colour_of,
    curve_panels,
    draw_curve,
    fitted,
    heat_map,
    marker_of,
    new_figure,
    panel_grid,
    plain,
    png,
    set_title,
)
from pipeline.results.results import Group, RunResult, evaluation_sets, groups

CHANCE = 0.01  # share of top entries that two unrelated tasks have in common
LEARNED, KEPT = "learning_accuracy", "average_performance"


@dataclass(frozen=True)
class Plot:
    """One figure to draw: its file name, and what it shows of whom."""

    file: str
    section: str
    label: str  # the group drawn; "" for all of them
    evaluation_set: str  # "" where it does not apply
    draw: Callable[[], Figure]


def figures(runs: Sequence[RunResult]) -> dict[str, bytes]:
    """Draw every figure of these runs: file name -> PNG bytes."""
    return {plot.file: png(plot.draw()) for plot in plots(runs)}


def plots(runs: Sequence[RunResult]) -> list[Plot]:
    """List the figures of these runs without drawing them; file names are unique."""
    found: list[Plot] = []
    tasks = [str(name) for name in runs[0].metrics["tasks"]]
    all_groups = groups(runs)

    def add(section: str, label: str, name: str, draw: Callable[[], Figure]) -> None:
        slug = "-".join(re.sub(r"[^\w.]+", "-", s).strip("-") for s in (section, label, name) if s)
        taken = any(plot.file == f"{slug}.png" for plot in found)
        file = f"{slug}-{len(found)}.png" if taken else f"{slug}.png"
        found.append(Plot(file, section, label, name, draw))

    for name in dict.fromkeys(name for run in runs for name in evaluation_sets(run.metrics)):
        matrices = {group.label: _matrices(group, name) for group in all_groups}
        matrices = {label: members for label, members in matrices.items() if members}
        add("forgetting", "", name, partial(_forgetting, tasks, matrices))
        points = {
            line.group.label: (line.metrics[LEARNED], line.metrics[KEPT])
            for line in compare(runs, name, (LEARNED, KEPT))
        }
        if len(points) > 1:
            add("stability-plasticity", "", name, partial(_stability_plasticity, points))
        for label, members in matrices.items():
            title = label + (f", mean of {len(members)} seeds" if len(members) > 1 else "")
            add("accuracy", label, name, partial(_accuracy, tasks, np.mean(members, axis=0), title))
    curves = _held_out_curves(all_groups)
    if curves:
        add("held-out", "", "", partial(_held_out, curves))
    for group in all_groups:
        measured = [run.importance for run in group.runs if run.importance is not None]
        seeds = [each for each in measured if "overlap" in each]
        if seeds:
            of = [str(name) for name in seeds[0]["tasks"]]
            add("importance", group.label, "", partial(_importance, of, seeds, group.label))
        if seeds and len(of) > 1:
            overlap = np.mean([np.array(each["overlap"], dtype=float) for each in seeds], axis=0)
            add("overlap", group.label, "", partial(_overlap, of, overlap, group.label))
    return found


def _matrices(group: Group, evaluation_set: str) -> list[Array]:
    """Give the accuracy matrices of a group's runs, leaving out runs without that set."""
    sets = [evaluation_sets(run.metrics) for run in group.runs]
    return [
        np.array(each[evaluation_set]["accuracy_matrix"], dtype=float)
        for each in sets
        if evaluation_set in each
    ]


def _held_out_curves(all_groups: Sequence[Group]) -> dict[str, dict[str, list[Array]]]:
    """Held-out skill -> method -> one curve per seed."""
    curves: dict[str, dict[str, list[Array]]] = {}
    for group in all_groups:
        for run in group.runs:
            for skill, scores in (run.metrics.get("held_out") or {}).items():
                of_skill = curves.setdefault(str(skill), {})
                of_skill.setdefault(group.label, []).append(np.array(scores, dtype=float))
    return curves


def _accuracy(tasks: Sequence[str], matrix: Array, title: str) -> Figure:
    figure, axes, _ = heat_map(matrix, tasks, ["base"], "Blues", Normalize(0, 1), title)
    axes.axhline(0.5, color="white", linewidth=3)
    for i in range(len(tasks)):  # the score right after training the task
        axes.add_patch(Rectangle((i - 0.5, i + 0.5), 1, 1, fill=False, edgecolor=INK, linewidth=1))
    axes.set_ylabel("after training", fontsize=8, color=INK)
    return figure


def _overlap(tasks: Sequence[str], overlap: Array, title: str) -> Figure:
    figure, _, bar = heat_map(overlap, tasks, [], "Purples", LogNorm(CHANCE / 3, 1), title)
    bar.set_yticks([CHANCE, 0.1, 1], ["0.01 = chance", "0.1", "1"])
    return figure


def _importance(tasks: Sequence[str], seeds: Sequence[Mapping[str, Any]], title: str) -> Figure:
    maps, kinds = _importance_shares(seeds)
    columns = 2 if len(maps) <= 4 else 3 if len(maps) <= 9 else 4
    figure, panels = panel_grid(len(maps), columns, 4.3, 0.42 + 0.17 * len(kinds))
    largest = max(np.nanmax(maps), 1e-12)
    smallest = np.nanmin(np.where(maps > 0, maps, np.nan)) if (maps > 0).any() else largest / 10
    norm = LogNorm(min(max(smallest, largest / 1000), largest / 2), largest)
    for axes, values, name in zip(panels, maps, tasks, strict=True):
        image = axes.imshow(
            np.maximum(values, 1e-15), cmap="YlGnBu", norm=norm, aspect="auto", interpolation="none"
        )
        set_title(axes, name, 28)
        axes.set_yticks(range(len(kinds)), [fitted(kind, 24) for kind in kinds])
    figure.supxlabel("layer", fontsize=8, color=INK)
    colour_bar(figure, image, figure.axes, "share of the task")
    figure.suptitle(fitted(title, 60), fontsize=9, color=INK, x=0.01, ha="left")
    return figure


def _importance_shares(seeds: Sequence[Mapping[str, Any]]) -> tuple[Array, list[str]]:
    """Tasks x module kinds x layers, each task summing to 1, averaged over seeds; the kinds."""
    first = seeds[0]["by_layer_and_module"]
    kinds = list(dict.fromkeys(str(kind) for table in first for kind in table))
    layers = max((len(row) for table in first for row in table.values()), default=1)
    values = np.full((len(seeds), len(first), max(len(kinds), 1), layers), np.nan)
    for s, seed in enumerate(seeds):
        for t, table in enumerate(seed["by_layer_and_module"]):
            for kind, row in table.items():
                values[s, t, kinds.index(kind), : len(row)] = row
    total = np.nansum(values, axis=(2, 3), keepdims=True)
    return np.mean(values / np.where(total > 0, total, 1), axis=0), kinds


def _forgetting(tasks: Sequence[str], matrices: Mapping[str, Sequence[Array]]) -> Figure:
    """Give each task a panel; before them one of the mean over the tasks trained so far."""
    count = len(tasks) + (len(tasks) > 1)
    figure, panels = curve_panels(count, list(matrices))
    if len(tasks) > 1:
        axes = panels.pop(0)
        set_title(axes, "mean of tasks so far", weight="bold")
        for i, members in enumerate(matrices.values()):
            so_far = [np.array([m[t, :t].mean() for t in range(1, len(m))]) for m in members]
            draw_curve(axes, np.arange(1, len(tasks) + 1), so_far, i)
    for t, (axes, name) in enumerate(zip(panels, tasks, strict=True)):
        set_title(axes, f"{t + 1} {name}", 20)
        axes.axvline(t + 1, color=GREY, linewidth=0.8, linestyle=":")
        for i, members in enumerate(matrices.values()):
            before = np.mean([m[: t + 2, t] for m in members], axis=0)
            axes.plot(np.arange(t + 2), before, color=colour_of(i), linewidth=0.8, linestyle=":")
            draw_curve(axes, np.arange(t + 1, len(tasks) + 1), [m[t + 1 :, t] for m in members], i)
    return figure


def _stability_plasticity(points: Mapping[str, tuple[Estimate, Estimate]]) -> Figure:
    """Learned against kept, with intervals where there are several seeds."""
    figure = new_figure(7.2, 4.2)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=":")
    for i, (label, (learned, kept)) in enumerate(points.items()):
        axes.errorbar(
            learned.mean, kept.mean, xerr=learned.half_width, yerr=kept.half_width,
            color=colour_of(i), marker=marker_of(i), markersize=6, linestyle="",
            elinewidth=0.7, markerfacecolor="none" if label in BOUNDS else None,
            label=fitted(label, 24),
        )  # fmt: skip
    low = min(min(x.mean, y.mean) for x, y in points.values())
    axes.set(xlim=(max(0, low - 0.1), 1.03), ylim=(max(0, low - 0.1), 1.03))
    axes.set_xlabel("learned: mean score right after training", fontsize=8, color=INK)
    axes.set_ylabel("kept: mean score at the end", fontsize=8, color=INK)
    axes.grid(color="#d8dee4", linewidth=0.6)
    plain(axes)
    figure.legend(loc="outside right upper", fontsize=7.5, frameon=False, labelcolor=INK)
    return figure


def _held_out(curves: Mapping[str, Mapping[str, Sequence[Array]]]) -> Figure:
    order = list(dict.fromkeys(label for of_skill in curves.values() for label in of_skill))
    figure, panels = curve_panels(len(curves), order)
    for axes, (skill, of_skill) in zip(panels, curves.items(), strict=True):
        set_title(axes, skill, 30)
        for label, members in of_skill.items():
            draw_curve(axes, np.arange(len(members[0])), members, order.index(label))
    return figure
