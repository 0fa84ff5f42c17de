"""The heat maps of a report: accuracy matrices, and what is by kind of module and layer."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from pipeline.results.checks import by_kind_and_layer
from pipeline.results.drawing import (
    GAP,
    INK,
    MOST_TIPS,
    Array,
    add_tips,
    color_bar,
    draw_cells,
    fitted,
    heat_map,
    panel_grid,
)

CHANCE = 0.01  # share of top entries that two unrelated tasks have in common


def accuracy_matrix(tasks: Sequence[str], matrix: Array, title: str) -> Figure:
    """Scores by task trained (and the base model) and task scored."""
    figure, axes, _ = heat_map(matrix, tasks, ["base"], "Blues", Normalize(0, 1), title)
    axes.axhline(0.5, color=GAP, linewidth=3)
    for i in range(len(tasks)):  # the score right after its own training
        axes.add_patch(Rectangle((i - 0.5, i + 0.5), 1, 1, fill=False, edgecolor=INK, linewidth=1))
    axes.set_ylabel("after training")
    return figure


def overlaps(tasks: Sequence[str], overlap: Array, title: str) -> Figure:
    """The share of top entries that each two tasks have in common."""
    figure, _, bar = heat_map(overlap, tasks, [], "Purples", LogNorm(CHANCE / 3, 1), title)
    bar.set_yticks([CHANCE, 0.1, 1], ["0.01 = chance", "0.1", "1"])
    return figure


def importances(tasks: Sequence[str], seeds: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """A panel per task: the share of its importance by kind of module and layer."""
    maps, kinds = _importance_shares(seeds)
    columns = 2 if len(maps) in (2, 4) else 3 if len(maps) <= 9 else 4
    figure, panels = panel_grid(len(maps), columns, 4.3, 0.42 + 0.17 * len(kinds))
    largest = max(np.nanmax(maps), 1e-12)
    smallest = np.nanmin(np.where(maps > 0, maps, np.nan)) if (maps > 0).any() else largest / 10
    lowest = min(max(smallest, largest / 1000), largest / 2)
    norm = LogNorm(lowest, largest)
    for axes, values, name in zip(panels, maps, tasks, strict=True):
        image = draw_cells(axes, np.maximum(values, 1e-15), "YlGnBu", norm)
        tip = "{:.2g} of " + name.replace("{", "{{").replace("}", "}}")
        _name_cells(axes, values, kinds, name, tip if maps.size <= MOST_TIPS else None)
    figure.supxlabel("layer")
    ticks = np.geomspace(lowest, largest, 3)
    bar = color_bar(figure, image, figure.axes, "share of the task")
    bar.set_yticks(ticks, [f"{tick:.2g}" for tick in ticks])
    figure.suptitle(fitted(title, 60), fontsize=9, x=0.01, ha="left")
    return figure


def _importance_shares(seeds: Sequence[Mapping[str, Any]]) -> tuple[Array, list[str]]:
    """Mean shares over seeds (task, kind of module, layer), each task summing to 1; the kinds."""
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


def directions_taken(by_label: Mapping[str, Mapping[str, float]]) -> Figure:
    """Heat maps (kind of module, layer) of the share of protected input directions, per method."""
    maps = {label: by_kind_and_layer(shares) for label, shares in by_label.items()}
    most = max(len(kinds) for kinds, _ in maps.values())
    figure, panels = panel_grid(len(maps), 2, 4.3, 0.42 + 0.17 * most, sharey=False)
    for axes, (label, (kinds, values)) in zip(panels, maps.items(), strict=True):
        image = draw_cells(axes, values, "YlOrRd", Normalize(0, 1))
        _name_cells(axes, values, kinds, label, "{:.2f}" if values.size <= MOST_TIPS else None)
    figure.supxlabel("layer")
    color_bar(figure, image, figure.axes, "share protected")
    return figure


def _name_cells(
    axes: Axes, values: Array, kinds: Sequence[str], title: str, tip: str | None
) -> None:
    """Title and kinds of a panel (kind of module, layer), and a `tip`, a format, of each cell."""
    if tip is not None:
        cells = np.ndenumerate(values)
        tips = [f"{kinds[i]}, layer {j}: {tip.format(value)}" for (i, j), value in cells]
        add_tips(axes, values.shape, tips)
    axes.set_title(fitted(title, 28))
    axes.set_yticks(range(len(kinds)), [fitted(kind, 24) for kind in kinds])
