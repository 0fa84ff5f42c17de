"""The figures of a report, as PNG bytes; the report embeds them and the tracker logs them.

Runs of one method with different seeds are drawn as one: heat maps show their mean, curves their
mean with every seed as a thin line. Everything is drawn through matplotlib's objects, without
pyplot, so any thread of any process may call this.
"""

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from pipeline.comparison import BOUNDS, Estimate, compare
from pipeline.results import Group, RunResult, evaluation_sets, groups

Array = NDArray[np.float64]
DPI = 150
CHANCE = 0.01  # share of top entries that two unrelated tasks have in common
MOST_CELL_NUMBERS = 12  # tasks; beyond it the cells are too small for a number
INK, GREY = "#24292f", "#8c959f"
MARKERS = "osD^vPX*<>"
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
        seeds = [run.importance for run in group.runs if run.importance is not None]
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
    figure, axes, _ = _heat_map(matrix, tasks, ["base"], "Blues", Normalize(0, 1), title)
    axes.axhline(0.5, color="white", linewidth=3)
    for i in range(len(tasks)):  # the score right after training the task
        axes.add_patch(Rectangle((i - 0.5, i + 0.5), 1, 1, fill=False, edgecolor=INK, linewidth=1))
    axes.set_ylabel("after training", fontsize=8, color=INK)
    return figure


def _overlap(tasks: Sequence[str], overlap: Array, title: str) -> Figure:
    figure, _, bar = _heat_map(overlap, tasks, [], "Purples", LogNorm(CHANCE / 3, 1), title)
    bar.set_yticks([CHANCE, 0.1, 1], ["0.01 = chance", "0.1", "1"])
    return figure


def _heat_map(
    values: Array,
    tasks: Sequence[str],
    top: Sequence[str],
    colours: str,
    norm: Normalize,
    title: str,
) -> tuple[Figure, Axes, Axes]:
    """Draw values of tasks by tasks, below the rows `top`; also its axes and its colour bar's."""
    names = [f"{i} {_short(name, 13)}" for i, name in enumerate(tasks, 1)]
    numbers = len(tasks) <= MOST_CELL_NUMBERS
    cell = min(0.56, max(0.12, 3.6 / len(tasks)))  # inches; two heat maps fit side by side
    height = max(0.62 * cell, 0.16)
    figure = new_figure(1.7 + cell * max(len(tasks), 2), 1.2 + height * len(values))
    axes = figure.subplots()
    image = axes.imshow(np.maximum(values, 1e-9), cmap=colours, norm=norm, aspect="auto")
    axes.set_yticks(range(len(values)), [*top, *names])
    steep = numbers and len(names) > 2 and max(map(len, names)) > 6
    columns = names if numbers else [f"{i}" if i % 5 == 0 else "" for i in range(1, len(tasks) + 1)]
    axes.set_xticks(range(len(names)), columns, rotation=40 if steep else 0)
    for tick in axes.get_xticklabels() if steep else []:
        tick.set(ha="right", rotation_mode="anchor")
    plain(axes)
    _title(axes, title)
    for (row, column), value in np.ndenumerate(values) if numbers else ():
        colour = "white" if norm(max(value, 1e-9)) > 0.6 else INK
        style: dict[str, Any] = {"ha": "center", "va": "center", "color": colour}
        axes.text(column, row, f"{value:.2f}", fontsize=8 if cell > 0.4 else 6.5, **style)
    return figure, axes, _colour_bar(figure, image, [axes], "")


def _importance(tasks: Sequence[str], seeds: Sequence[Mapping[str, Any]], title: str) -> Figure:
    maps, kinds = _importance_shares(seeds)
    columns = 2 if len(maps) <= 4 else 3 if len(maps) <= 9 else 4
    figure, panels = _panels(len(maps), columns, 4.3, 0.42 + 0.17 * len(kinds))
    largest = max(np.nanmax(maps), 1e-12)
    smallest = np.nanmin(np.where(maps > 0, maps, np.nan)) if (maps > 0).any() else largest / 10
    norm = LogNorm(min(max(smallest, largest / 1000), largest / 2), largest)
    for axes, values, name in zip(panels, maps, tasks, strict=True):
        image = axes.imshow(
            np.maximum(values, 1e-15), cmap="YlGnBu", norm=norm, aspect="auto", interpolation="none"
        )
        _title(axes, name, 28)
        axes.set_yticks(range(len(kinds)), [_short(kind, 24) for kind in kinds])
    figure.supxlabel("layer", fontsize=8, color=INK)
    _colour_bar(figure, image, figure.axes, "share of the task")
    figure.suptitle(_short(title, 60), fontsize=9, color=INK, x=0.01, ha="left")
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
    figure, panels = _curve_panels(count, list(matrices))
    if len(tasks) > 1:
        axes = panels.pop(0)
        _title(axes, "mean of tasks so far", weight="bold")
        for i, members in enumerate(matrices.values()):
            so_far = [np.array([m[t, :t].mean() for t in range(1, len(m))]) for m in members]
            _line(axes, np.arange(1, len(tasks) + 1), so_far, i)
    for t, (axes, name) in enumerate(zip(panels, tasks, strict=True)):
        _title(axes, f"{t + 1} {name}", 20)
        axes.axvline(t + 1, color=GREY, linewidth=0.8, linestyle=":")
        for i, members in enumerate(matrices.values()):
            before = np.mean([m[: t + 2, t] for m in members], axis=0)
            axes.plot(np.arange(t + 2), before, color=_colour(i), linewidth=0.8, linestyle=":")
            _line(axes, np.arange(t + 1, len(tasks) + 1), [m[t + 1 :, t] for m in members], i)
    return figure


def _stability_plasticity(points: Mapping[str, tuple[Estimate, Estimate]]) -> Figure:
    """Learned against kept, with intervals where there are several seeds."""
    figure = new_figure(7.2, 4.2)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=":")
    for i, (label, (learned, kept)) in enumerate(points.items()):
        axes.errorbar(
            learned.mean, kept.mean, xerr=learned.half_width, yerr=kept.half_width,
            color=_colour(i), marker=MARKERS[i % len(MARKERS)], markersize=6, linestyle="",
            elinewidth=0.7, markerfacecolor="none" if label in BOUNDS else None,
            label=_short(label, 24),
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
    figure, panels = _curve_panels(len(curves), order)
    for axes, (skill, of_skill) in zip(panels, curves.items(), strict=True):
        _title(axes, skill, 30)
        for label, members in of_skill.items():
            _line(axes, np.arange(len(members[0])), members, order.index(label))
    return figure


def _curve_panels(count: int, names: Sequence[str]) -> tuple[Figure, list[Axes]]:
    """Lay out panels that share axes, with the legend of all methods above them."""
    columns = 3 if count <= 6 else 5 if count <= 15 else 6
    figure, panels = _panels(count, columns, 3.3, 1.75 if columns == 3 else 1.35)
    for axes in panels:
        axes.set_ylim(-0.04, 1.04)
        axes.set_yticks([0, 0.5, 1])
        axes.grid(axis="y", color="#d8dee4", linewidth=0.6)
    handles = [
        panels[0].plot([], [], color=_colour(i), marker=MARKERS[i % len(MARKERS)], markersize=4)[0]
        for i in range(len(names))
    ]
    per_row = min(len(names), max(2, 2 * min(count, columns)))
    figure.legend(
        handles, [_short(name, 24) for name in names], loc="outside upper left", ncols=per_row,
        fontsize=8, frameon=False, labelcolor=INK,
    )  # fmt: skip
    figure.supxlabel("tasks trained (0 = base model)", fontsize=8, color=INK)
    figure.supylabel("score", fontsize=8, color=INK)
    return figure, panels


def _panels(count: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """Lay out panels of that size, in inches, which share their axes; the page bounds the width."""
    columns = min(count, columns)
    rows = -(-count // columns)
    figure = new_figure(min(10.6, 0.7 + width * columns), 0.8 + height * rows)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for i, axes in enumerate(panels):
        axes.set_visible(i < count)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.tick_params(labelbottom=i >= count - columns)
        plain(axes)
    return figure, list(panels[:count])


def _line(axes: Axes, x: NDArray[np.int_], members: Sequence[Array], index: int) -> None:
    for scores in members if len(members) > 1 else []:
        axes.plot(x, scores, color=_colour(index), linewidth=0.6, alpha=0.45)
    marker = MARKERS[index % len(MARKERS)] if x[-1] <= MOST_CELL_NUMBERS or len(x) == 1 else ""
    mean = np.mean(members, axis=0)
    axes.plot(x, mean, color=_colour(index), linewidth=1.4, marker=marker, markersize=3)


def _colour_bar(figure: Figure, image: AxesImage, panels: list[Axes], label: str) -> Axes:
    bar = figure.colorbar(image, ax=panels, fraction=0.05, pad=0.02, aspect=25)
    bar.outline.set_visible(False)
    bar.set_label(label, fontsize=8, color=INK)
    bar.ax.minorticks_off()
    bar.ax.tick_params(labelsize=7, colors=INK)
    return bar.ax


def plain(axes: Axes) -> None:
    """Leave out frame and ticks."""
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=7.5, labelcolor=INK)


def _title(axes: Axes, text: str, most: int = 44, weight: str = "normal") -> None:
    axes.set_title(_short(text, most), fontsize=8.5, color=INK, loc="left", fontweight=weight)


def _short(text: str, most: int) -> str:
    """Fit a user's name on one line; a `$` would start mathematics in matplotlib."""
    line = "".join(c if c.isprintable() else " " for c in text)
    line = line if len(line) <= most else line[: most - 1] + "…"
    return line.replace("$", r"\$")


def _colour(index: int) -> tuple[float, float, float, float]:
    return matplotlib.colormaps["tab20"]((2 * index) % 20 + (index // 10) % 2)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, inches wide and high."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def png(figure: Figure) -> bytes:
    """The figure as PNG bytes."""
    buffer = BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a name beyond the font: boxes
        figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()
