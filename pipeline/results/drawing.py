"""What figures are drawn with: sizes, colours, and the panels that several of them share."""

import warnings
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from numpy.typing import NDArray

Array = NDArray[np.float64]
DPI = 150
MOST_CELL_NUMBERS = 12  # tasks; beyond it the cells are too small for a number
INK, GREY = "#24292f", "#8c959f"
_MARKERS = "osD^vPX*<>"


def heat_map(
    values: Array,
    tasks: Sequence[str],
    top: Sequence[str],
    colours: str,
    norm: Normalize,
    title: str,
) -> tuple[Figure, Axes, Axes]:
    """Draw values of tasks by tasks, below the rows `top`; also its axes and its colour bar's."""
    names = [f"{i} {fitted(name, 13)}" for i, name in enumerate(tasks, 1)]
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
    set_title(axes, title)
    for (row, column), value in np.ndenumerate(values) if numbers else ():
        colour = "white" if norm(max(value, 1e-9)) > 0.6 else INK
        style: dict[str, Any] = {"ha": "center", "va": "center", "color": colour}
        axes.text(column, row, f"{value:.2f}", fontsize=8 if cell > 0.4 else 6.5, **style)
    return figure, axes, colour_bar(figure, image, [axes], "")


def curve_panels(count: int, names: Sequence[str]) -> tuple[Figure, list[Axes]]:
    """Lay out panels that share axes, with the legend of all methods above them."""
    columns = 3 if count <= 6 else 5 if count <= 15 else 6
    figure, panels = panel_grid(count, columns, 3.3, 1.75 if columns == 3 else 1.35)
    for axes in panels:
        axes.set_ylim(-0.04, 1.04)
        axes.set_yticks([0, 0.5, 1])
        axes.grid(axis="y", color="#d8dee4", linewidth=0.6)
    handles = [
        panels[0].plot([], [], color=colour_of(i), marker=marker_of(i), markersize=4)[0]
        for i in range(len(names))
    ]
    per_row = min(len(names), max(2, 2 * min(count, columns)))
    figure.legend(
        handles, [fitted(name, 24) for name in names], loc="outside upper left", ncols=per_row,
        fontsize=8, frameon=False, labelcolor=INK,
    )  # fmt: skip
    figure.supxlabel("tasks trained (0 = base model)", fontsize=8, color=INK)
    figure.supylabel("score", fontsize=8, color=INK)
    return figure, panels


def panel_grid(count: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
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


def draw_curve(axes: Axes, x: NDArray[np.int_], members: Sequence[Array], index: int) -> None:
    """The mean of several curves, and each of them as a thin line."""
    for scores in members if len(members) > 1 else []:
        axes.plot(x, scores, color=colour_of(index), linewidth=0.6, alpha=0.45)
    marker = marker_of(index) if x[-1] <= MOST_CELL_NUMBERS or len(x) == 1 else ""
    mean = np.mean(members, axis=0)
    axes.plot(x, mean, color=colour_of(index), linewidth=1.4, marker=marker, markersize=3)


def colour_bar(figure: Figure, image: AxesImage, panels: list[Axes], label: str) -> Axes:
    """A colour bar beside the panels; its axes."""
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


def set_title(axes: Axes, text: str, most: int = 44, weight: str = "normal") -> None:
    """Put a title over the left end of the axes, cut to `most` characters."""
    axes.set_title(fitted(text, most), fontsize=8.5, color=INK, loc="left", fontweight=weight)


def fitted(text: str, most: int) -> str:
    """Fit a user's name on one line; a `$` would start mathematics in matplotlib."""
    line = "".join(c if c.isprintable() else " " for c in text)
    line = line if len(line) <= most else line[: most - 1] + "…"
    return line.replace("$", r"\$")


def colour_of(index: int) -> tuple[float, float, float, float]:
    """Red, green, blue and opacity of the method with this number; twenty are told apart."""
    return matplotlib.colormaps["tab20"]((2 * index) % 20 + (index // 10) % 2)


def marker_of(index: int) -> str:
    """The marker of the method with this number."""
    return _MARKERS[index % len(_MARKERS)]


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
