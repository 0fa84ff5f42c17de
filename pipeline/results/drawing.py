"""What the figures share: sizes, colors, grids of panels, and SVG with tips."""

import html
import re
import warnings
from collections.abc import Sequence
from io import StringIO
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from pipeline.config.presets import METHODS

Array = NDArray[np.float64]
MOST_CELL_NUMBERS = 12  # tasks; with more, cells are too small for numbers
INK, GREY, LINE = "#24292f", "#8c959f", "#d8dee4"
PAPER, GAP = "#fefefe", "#fdfdfd"
_VARIABLES = {
    INK: "currentColor",
    GREY: "var(--quiet)",
    LINE: "var(--line)",
    PAPER: "none",
    GAP: "var(--page)",
}
"""The page's colors in place of those of the figure, so that it follows a dark page."""
CSS_PIXELS = 96  # per inch
STYLE: Any = {
    "text.color": INK,
    "figure.dpi": 150,
    "figure.constrained_layout.use": True,
    "figure.labelsize": 8,
    "axes.titlelocation": "left",
    "axes.titlesize": 8.5,
    "axes.labelsize": 8,
    "axes.labelcolor": INK,
    "grid.color": LINE,
    "figure.facecolor": PAPER,
    "axes.facecolor": "none",
    "svg.fonttype": "none",
    "grid.linewidth": 0.6,
    "legend.fontsize": 8,
    "legend.frameon": False,
    **{f"axes.spines.{side}": False for side in ("left", "right", "top", "bottom")},
    **{f"{axis}tick.{which}.size": 0 for axis in "xy" for which in ("major", "minor")},
    **{f"{axis}tick.labelsize": 7.5 for axis in "xy"},
    **{f"{axis}tick.labelcolor": INK for axis in "xy"},
}
"""Matplotlib's settings for all figures."""
_MARKERS = "osD^vPX*<>"
_TIP, _BETWEEN = "tip|", "\u2028"
Styles = dict[str, dict[str, Any]]
"""Color and marker by name."""


def curve_panels(count: int, names: Sequence[str], styles: Styles) -> tuple[Figure, list[Axes]]:
    """Lay out panels for scores in [0, 1], with one legend above them."""
    figure, panels = legend_panels(count, names, styles)
    for axes in panels:
        axes.set_ylim(-0.04, 1.04)
        axes.set_yticks([0, 0.5, 1])
    figure.supxlabel("tasks trained (0 = base model)")
    figure.supylabel("score")
    return figure, panels


def legend_panels(
    count: int, names: Sequence[str], styles: Styles, *, sharey: bool = True
) -> tuple[Figure, list[Axes]]:
    """Lay out panels for curves, with one legend above them."""
    columns = 4 if count == 4 else 3 if count <= 6 else 5 if count <= 15 else 6
    height = 1.75 if columns <= 4 else 1.35
    figure, panels = panel_grid(count, columns, 3.3, height, sharey=sharey)
    for axes in panels:
        axes.grid(axis="y")
    handles = [panels[0].plot([], [], markersize=4, **styles[name])[0] for name in names]
    per_row = min(len(names), max(2, 2 * min(count, columns)))
    shown = [fitted(name, 24) for name in names]
    figure.legend(handles, shown, loc="outside upper left", ncols=per_row)
    return figure, panels


def panel_grid(
    count: int, columns: int, width: float, height: float, *, sharey: bool = True
) -> tuple[Figure, list[Axes]]:
    """Lay out panels of a size in inches that share their axes, at most as wide as the page."""
    columns = min(count, columns)
    rows = -(-count // columns)
    figure = Figure((min(10.6, 0.7 + width * columns), 0.8 + height * rows))
    panels = figure.subplots(rows, columns, sharex=True, sharey=sharey, squeeze=False).ravel()
    for i, axes in enumerate(panels):
        axes.set_visible(i < count)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.tick_params(labelbottom=i >= count - columns)
    return figure, list(panels[:count])


def draw_curve(
    axes: Axes, x: NDArray[np.int_], members: Sequence[Array], label: str, styles: Styles
) -> None:
    """Draw the mean of several curves, and each of them as a thin line."""
    style = {**styles[label], "markersize": 3, "linewidth": 1.4}
    for scores in members if len(members) > 1 else []:
        axes.plot(x, scores, color=style["color"], linewidth=0.6, alpha=0.45)
    mean = np.mean(members, axis=0)
    tips = [f"{label}, after {at}: {value:.3f}" for at, value in zip(x, mean, strict=True)]
    if x[-1] > MOST_CELL_NUMBERS and len(x) > 1:
        style["marker"] = ""  # Markers would hide the line.
        tips = [f"{label}: {mean[0]:.3f} after {x[0]}, {mean[-1]:.3f} after {x[-1]}"]
    axes.plot(x, mean, gid=tip(*tips), **style)


def fitted(text: str, most: int) -> str:
    """Fit a user's name on one line; an unescaped `$` starts math in matplotlib."""
    line = "".join(c if c.isprintable() else " " for c in text)
    line = line if len(line) <= most else line[: most - 1] + "…"
    return line.replace("$", r"\$")


def styles_of(names: Sequence[str]) -> Styles:
    """Color and marker by name: a method has the same ones in every report.

    Other names (two runs with the same method and seed) get further ones, in their order.
    """
    order = [*METHODS, *dict.fromkeys(name for name in names if name not in METHODS)]
    strong, muted = matplotlib.colormaps["tab20"], matplotlib.colormaps["tab20b"]
    # First those far apart: tab20 has pairs of a hue, tab20b four shades of five.
    colors = [strong((2 * i) % 20 + i // 10) for i in range(20)]
    colors += [muted((4 * i) % 20 + i // 5) for i in range(20)]
    return {
        name: {
            "color": colors[i % len(colors)],
            "marker": _MARKERS[(i + i // 20) % len(_MARKERS)],
        }
        for i, name in enumerate(order)
    }


def tip(*texts: str) -> str:
    """The `gid` of an artist that shows a text on hover, or of a line with one for each marker."""
    plain = ("".join(c if c.isprintable() else " " for c in text) for text in texts)
    return _TIP + _BETWEEN.join(text.replace(r"\$", "$") for text in plain)


def svg(figure: Figure, salt: str) -> str:
    """Render the figure as SVG with the tips of its artists, the same each time.

    `salt` keeps the ids of figures on one page apart.
    """
    buffer = StringIO()
    with warnings.catch_warnings(), matplotlib.rc_context({"svg.hashsalt": salt}):
        warnings.filterwarnings("ignore", message="Glyph")  # a name the font cannot show
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.S)
    tipped = rf'<g id="{re.escape(_TIP)}(.*?)">(.*?)(?=<g id="|\Z)'
    return re.sub(tipped, _with_tips, text, flags=re.S)


def _with_tips(group: re.Match[str]) -> str:
    texts, content = group[1].split(_BETWEEN), group[2]
    titles = [f"<title>{html.escape(html.unescape(text))}</title>" for text in texts]
    if len(titles) == 1:
        return f"<g>{titles[0]}{content}"
    rest = iter(titles)  # Markers stand in the order of the points.
    return "<g>" + re.sub(
        r"<use([^>]*?)/>", lambda use: f"<use{use[1]}>{next(rest, '')}</use>", content
    )


def inline(text: str, label: str) -> str:
    """An SVG as part of a page: in the page's colors, with a label for those who cannot see it."""
    _, _, content = text.partition("<svg")
    attributes, _, content = content.partition(">")
    found = re.search(r'viewBox="0 0 ([\d.]+) [\d.]+"', attributes)
    assert found  # Matplotlib writes it, in points.
    for color, variable in _VARIABLES.items():
        content = content.replace(color, variable)
    width = f"{float(found[1]) * CSS_PIXELS / 72:.0f}"
    label = html.escape(label)
    return f'<svg {found[0]} width="{width}" role="img" aria-label="{label}">{content}'
