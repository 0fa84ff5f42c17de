"""The heat maps of a report: accuracy matrices, and what is by kind of module and layer."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle

from pipeline.results.checks import by_kind_and_layer
from pipeline.results.drawing import (
    GAP,
    INK,
    MOST_CELL_NUMBERS,
    Array,
    fitted,
    panel_grid,
    tip,
)

MOST_TIPS = 600  # cells of a heat map that show their value on hover
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


def heat_map(
    values: Array,
    tasks: Sequence[str],
    top: Sequence[str],
    colors: str,
    norm: Normalize,
    title: str,
) -> tuple[Figure, Axes, Axes]:
    """Draw a row per name in `top` and per task, a column per task.

    Returns the figure, the axes of the map and those of its color bar.
    """
    names = [f"{i} {fitted(name, 13)}" for i, name in enumerate(tasks, 1)]
    has_numbers = len(tasks) <= MOST_CELL_NUMBERS
    cell = min(0.56, max(0.12, 3.6 / len(tasks)))  # inches; two heat maps fit side by side
    height = max(0.62 * cell, 0.16)
    figure = Figure((1.7 + cell * max(len(tasks), 2), 1.2 + height * len(values)))
    axes = figure.subplots()
    image = draw_cells(axes, np.maximum(values, 1e-9), colors, norm)
    on, of = [*top, *names], names
    if values.size <= MOST_TIPS:
        tips = [f"{row}, {column}: {values[i, j]:.3f}"
                for i, row in enumerate(on) for j, column in enumerate(of)]  # fmt: skip
        add_tips(axes, values.shape, tips)
    axes.set_yticks(range(len(values)), [*top, *names])
    every_fifth = [f"{i}" if i % 5 == 0 else "" for i in range(1, len(tasks) + 1)]
    is_steep = has_numbers and len(names) > 2 and max(map(len, names)) > 6
    steep: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
    columns = names if has_numbers else every_fifth
    axes.set_xticks(range(len(names)), columns, **(steep if is_steep else {}))
    axes.set_title(fitted(title, 44))
    for (row, column), value in np.ndenumerate(values) if has_numbers else ():
        color = "white" if norm(max(value, 1e-9)) > 0.6 else "#1b1f24"  # Not that of the page.
        size = 8 if cell > 0.4 else 6.5
        style: dict[str, Any] = {"ha": "center", "va": "center", "color": color, "fontsize": size}
        axes.text(column, row, f"{value:.2f}", **style)
    return figure, axes, color_bar(figure, image, [axes], "")


def draw_cells(axes: Axes, values: Array, colors: str, norm: Normalize) -> AxesImage:
    """Draw a matrix as colored cells."""
    return axes.imshow(values, cmap=colors, norm=norm, aspect="auto", interpolation="none")


def add_tips(axes: Axes, shape: tuple[int, ...], tips: Iterable[str]) -> None:
    """Show a text on hover for every cell of a matrix, given row by row."""
    for (row, column), text in zip(np.ndindex(*shape), tips, strict=True):
        at = (column - 0.5, row - 0.5)
        axes.add_patch(Rectangle(at, 1, 1, alpha=0, linewidth=0, gid=tip(text)))


def color_bar(figure: Figure, image: AxesImage, panels: list[Axes], label: str) -> Axes:
    """Add a color bar beside the panels and return its axes."""
    bar = figure.colorbar(image, ax=panels, fraction=0.05, pad=0.02, aspect=25)
    bar.outline.set_visible(False)
    bar.set_label(label)
    bar.ax.minorticks_off()
    for solids in bar.ax.collections:
        solids.set_rasterized(True)  # Else one path per color.
    bar.ax.tick_params(length=3.5, labelsize=7, colors=INK)
    return bar.ax
