"""What the figures share: sizes, colors, heat maps, and grids of panels."""

import warnings
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from numpy.typing import NDArray

Array = NDArray[np.float64]
MOST_CELL_NUMBERS = 12  # tasks; with more, cells are too small for numbers
INK, GREY = "#24292f", "#8c959f"
STYLE: Any = {
    "text.color": INK,
    "figure.dpi": 150,
    "figure.constrained_layout.use": True,
    "figure.labelsize": 8,
    "axes.titlelocation": "left",
    "axes.titlesize": 8.5,
    "axes.labelsize": 8,
    "axes.labelcolor": INK,
    "grid.color": "#d8dee4",
    "grid.linewidth": 0.6,
    "legend.fontsize": 8,
    "legend.frameon": False,
    **{f"axes.spines.{side}": False for side in ("left", "right", "top", "bottom")},
    **{f"{axis}tick.major.size": 0 for axis in "xy"},
    **{f"{axis}tick.labelsize": 7.5 for axis in "xy"},
    **{f"{axis}tick.labelcolor": INK for axis in "xy"},
}
"""Matplotlib's settings for all figures."""
_MARKERS = "osD^vPX*<>"


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
    image = axes.imshow(np.maximum(values, 1e-9), cmap=colors, norm=norm, aspect="auto")
    axes.set_yticks(range(len(values)), [*top, *names])
    every_fifth = [f"{i}" if i % 5 == 0 else "" for i in range(1, len(tasks) + 1)]
    is_steep = has_numbers and len(names) > 2 and max(map(len, names)) > 6
    steep: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
    columns = names if has_numbers else every_fifth
    axes.set_xticks(range(len(names)), columns, **(steep if is_steep else {}))
    axes.set_title(fitted(title, 44))
    for (row, column), value in np.ndenumerate(values) if has_numbers else ():
        color = "white" if norm(max(value, 1e-9)) > 0.6 else INK
        size = 8 if cell > 0.4 else 6.5
        style: dict[str, Any] = {"ha": "center", "va": "center", "color": color, "fontsize": size}
        axes.text(column, row, f"{value:.2f}", **style)
    return figure, axes, color_bar(figure, image, [axes], "")


def curve_panels(count: int, names: Sequence[str]) -> tuple[Figure, list[Axes]]:
    """Lay out panels for curves, with one legend above them."""
    columns = 4 if count == 4 else 3 if count <= 6 else 5 if count <= 15 else 6
    figure, panels = panel_grid(count, columns, 3.3, 1.75 if columns <= 4 else 1.35)
    for axes in panels:
        axes.set_ylim(-0.04, 1.04)
        axes.set_yticks([0, 0.5, 1])
        axes.grid(axis="y")
    handles = [panels[0].plot([], [], markersize=4, **style_of(i))[0] for i in range(len(names))]
    per_row = min(len(names), max(2, 2 * min(count, columns)))
    shown = [fitted(name, 24) for name in names]
    figure.legend(handles, shown, loc="outside upper left", ncols=per_row)
    figure.supxlabel("tasks trained (0 = base model)")
    figure.supylabel("score")
    return figure, panels


def panel_grid(count: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """Lay out panels of a size in inches that share their axes, at most as wide as the page."""
    columns = min(count, columns)
    rows = -(-count // columns)
    figure = Figure((min(10.6, 0.7 + width * columns), 0.8 + height * rows))
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for i, axes in enumerate(panels):
        axes.set_visible(i < count)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.tick_params(labelbottom=i >= count - columns)
    return figure, list(panels[:count])


def draw_curve(axes: Axes, x: NDArray[np.int_], members: Sequence[Array], index: int) -> None:
    """Draw the mean of several curves, and each of them as a thin line."""
    style = style_of(index)
    for scores in members if len(members) > 1 else []:
        axes.plot(x, scores, color=style["color"], linewidth=0.6, alpha=0.45)
    if x[-1] > MOST_CELL_NUMBERS and len(x) > 1:
        style["marker"] = ""  # Markers would hide the line.
    axes.plot(x, np.mean(members, axis=0), linewidth=1.4, markersize=3, **style)


def color_bar(figure: Figure, image: AxesImage, panels: list[Axes], label: str) -> Axes:
    """Add a color bar beside the panels and return its axes."""
    bar = figure.colorbar(image, ax=panels, fraction=0.05, pad=0.02, aspect=25)
    bar.outline.set_visible(False)
    bar.set_label(label)
    bar.ax.minorticks_off()
    bar.ax.tick_params(length=3.5, labelsize=7, colors=INK)
    return bar.ax


def fitted(text: str, most: int) -> str:
    """Fit a user's name on one line; an unescaped `$` starts math in matplotlib."""
    line = "".join(c if c.isprintable() else " " for c in text)
    line = line if len(line) <= most else line[: most - 1] + "…"
    return line.replace("$", r"\$")


def style_of(index: int) -> dict[str, Any]:
    """Color and marker of the method with this index, unique for up to twenty methods."""
    color = matplotlib.colormaps["tab20"]((2 * index) % 20 + (index // 10) % 2)
    return {"color": color, "marker": _MARKERS[index % len(_MARKERS)]}


def png(figure: Figure) -> bytes:
    """Render the figure as PNG."""
    buffer = BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a name the font cannot show
        figure.savefig(buffer, format="png")
    return buffer.getvalue()
