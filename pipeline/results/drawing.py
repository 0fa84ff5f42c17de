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
DPI = 150
MOST_CELL_NUMBERS = 12  # tasks; with more, cells are too small for numbers
INK, GREY = "#24292f", "#8c959f"
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
    figure = new_figure(1.7 + cell * max(len(tasks), 2), 1.2 + height * len(values))
    axes = figure.subplots()
    image = axes.imshow(np.maximum(values, 1e-9), cmap=colors, norm=norm, aspect="auto")
    axes.set_yticks(range(len(values)), [*top, *names])
    every_fifth = [f"{i}" if i % 5 == 0 else "" for i in range(1, len(tasks) + 1)]
    is_steep = has_numbers and len(names) > 2 and max(map(len, names)) > 6
    steep: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
    columns = names if has_numbers else every_fifth
    axes.set_xticks(range(len(names)), columns, **(steep if is_steep else {}))
    plain(axes)
    set_title(axes, title)
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
        axes.grid(axis="y", color="#d8dee4", linewidth=0.6)
    handles = [panels[0].plot([], [], markersize=4, **style_of(i))[0] for i in range(len(names))]
    per_row = min(len(names), max(2, 2 * min(count, columns)))
    figure.legend(
        handles, [fitted(name, 24) for name in names], loc="outside upper left", ncols=per_row,
        fontsize=8, frameon=False, labelcolor=INK,
    )  # fmt: skip
    figure.supxlabel("tasks trained (0 = base model)", fontsize=8, color=INK)
    figure.supylabel("score", fontsize=8, color=INK)
    return figure, panels


def panel_grid(count: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """Lay out panels of a size in inches that share their axes, at most as wide as the page."""
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
    bar.set_label(label, fontsize=8, color=INK)
    bar.ax.minorticks_off()
    bar.ax.tick_params(labelsize=7, colors=INK)
    return bar.ax


def plain(axes: Axes) -> None:
    """Remove frame and tick marks."""
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=7.5, labelcolor=INK)


def set_title(axes: Axes, text: str, most: int = 44, weight: str = "normal") -> None:
    """Put a title above the axes, aligned left and cut to `most` characters."""
    axes.set_title(fitted(text, most), fontsize=8.5, color=INK, loc="left", fontweight=weight)


def fitted(text: str, most: int) -> str:
    """Fit a user's name on one line; an unescaped `$` starts math in matplotlib."""
    line = "".join(c if c.isprintable() else " " for c in text)
    line = line if len(line) <= most else line[: most - 1] + "…"
    return line.replace("$", r"\$")


def style_of(index: int) -> dict[str, Any]:
    """Color and marker of the method with this index, unique for up to twenty methods."""
    color = matplotlib.colormaps["tab20"]((2 * index) % 20 + (index // 10) % 2)
    return {"color": color, "marker": _MARKERS[index % len(_MARKERS)]}


def new_figure(width: float, height: float) -> Figure:
    """Create an empty figure of a size in inches."""
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")


def png(figure: Figure) -> bytes:
    """Render the figure as PNG."""
    buffer = BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a name the font cannot show
        figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()
