"""`python -m bench.picture`: draw kept against learned from the headline table of RESULTS.md.

The headline table is the first one with a column `<set>: kept`; the next `learned` column is of the
same set. Every set gets a panel, every method a point with its interval.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator
from matplotlib.transforms import Bbox

from pipeline.config.presets import BOUNDS
from pipeline.results.comparison import BASELINE

FOLDER = Path(__file__).parent.parent.parent / "agcl"
RESULTS, PICTURE = FOLDER / "RESULTS.md", FOLDER / "kept_against_learned.png"
SOURCE = "Source"
"""Key of the PNG's metadata that holds the numbers it was drawn from."""
_KEPT, _LEARNED = ": kept", "learned"
_NUMBER = re.compile(r"(\d\.\d+)(?: ±(\d\.\d+))?")
_LEGEND = "bars: 95 % interval over seeds    hollow: upper bound    dashed: nothing forgotten"
_INK, _GREY, _BLUE, _RED = "#24292f", "#6e7781", "#0a5aa8", "#c4320a"
_COLORS = {"agcl": _BLUE, BASELINE: _RED} | dict.fromkeys(BOUNDS, _INK)


@dataclass(frozen=True)
class Point:
    """Scores of one method on one set."""

    method: str
    learned: float
    kept: float
    interval: float | None
    """Half width of the 95 % interval of `kept`, where the table has one."""


@dataclass(frozen=True)
class Headline:
    """The headline table: the section it is in, and the points of every set."""

    title: str
    sets: dict[str, list[Point]]


def headline(text: str) -> Headline:
    """Parse the headline table. Raises `ValueError` if there is none, or it lacks a column."""
    title, lines = "", text.splitlines()
    for number, line in enumerate(lines):
        if line.startswith("#"):
            title = line.strip("# ")
        names = _cells(line)
        if not any(name.endswith(_KEPT) for name in names):
            continue
        rows = [_cells(row) for row in _table(lines[number + 2 :])]
        return Headline(title, {name: _points(rows, *at) for name, at in _columns(names).items()})
    raise ValueError(f"no table with a column '<set>{_KEPT}'")


def draw(found: Headline) -> Figure:
    """Draw one panel per set; bounds are hollow."""
    figure = Figure(figsize=(9, 4.8), dpi=100, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(found.title, x=0.01, ha="left", fontsize=11, color=_INK, fontweight="bold")
    figure.text(0.99, 0.985, _LEGEND, ha="right", va="top", fontsize=8.5, color=_GREY)
    panels = figure.subplots(1, len(found.sets), squeeze=False)[0]
    for axes, (name, points) in zip(panels, found.sets.items(), strict=True):
        _draw_points(axes, name, points)
    figure.draw_without_rendering()  # Labels are placed in pixels, so the layout must be known.
    figure.set_layout_engine("none")
    for axes, points in zip(panels, found.sets.values(), strict=True):
        _label(axes, points)
    return figure


def main() -> None:
    """Write the picture beside RESULTS.md."""
    found = headline(RESULTS.read_text(encoding="utf-8"))
    draw(found).savefig(PICTURE, metadata={SOURCE: repr(found)})
    print(PICTURE)


def _table(lines: list[str]) -> list[str]:
    end = next((n for n, line in enumerate(lines) if not line.startswith("|")), len(lines))
    return lines[:end]


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")] if "|" in line else []


def _columns(names: list[str]) -> dict[str, tuple[int, int, int]]:
    """Columns of the method, what it keeps and what it learned, by set."""
    if "method" not in names:
        raise ValueError("the headline table has no column 'method'")
    found = {}
    for at, name in enumerate(names):
        if name.endswith(_KEPT):
            if names[at + 1 : at + 2] != [_LEARNED]:
                raise ValueError(f"the headline table has no column '{_LEARNED}' after '{name}'")
            found[name.removesuffix(_KEPT)] = (names.index("method"), at, at + 1)
    return found


def _points(rows: list[list[str]], method: int, kept: int, learned: int) -> list[Point]:
    found = []
    for row in rows:
        numbers = [_NUMBER.fullmatch(row[column]) for column in (kept, learned)]
        if not all(numbers):
            raise ValueError(f"no score in '{row[kept]}' or '{row[learned]}' of {row[method]}")
        (mean, half), (right_after, _) = (number.groups() for number in numbers if number)
        interval = None if half is None else float(half)
        found.append(Point(row[method].strip("`"), float(right_after), float(mean), interval))
    return found


def _draw_points(axes: Axes, name: str, points: list[Point]) -> None:
    for point in points:
        color = _COLORS.get(point.method, _GREY)
        axes.errorbar(
            point.learned, point.kept, yerr=point.interval, color=color, marker="o", markersize=6,
            markerfacecolor="white" if point.method in BOUNDS else color,
            elinewidth=1, capsize=2, linestyle="none", zorder=5 if point.method == "agcl" else 3,
        )  # fmt: skip
    learned = [point.learned for point in points]
    low = min(point.kept - (point.interval or 0) for point in points)
    high = max(point.kept + (point.interval or 0) for point in points)
    margin = max(0.35 * (max(learned) - min(learned)), 0.035)
    axes.set_xlim(min(learned) - margin, max(learned) + margin)
    axes.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))
    axes.axline((0, 0), slope=1, color=_GREY, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    axes.xaxis.set_major_locator(FixedLocator(_ticks(*axes.get_xlim())))
    axes.yaxis.set_major_locator(FixedLocator(_ticks(*axes.get_ylim())))
    axes.set_title(name, loc="left", fontsize=10, color=_INK)
    axes.set_xlabel("learned: score right after its task", fontsize=9, color=_INK)
    axes.set_ylabel("kept: score after the last task", fontsize=9, color=_INK)
    axes.tick_params(labelsize=8, colors=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#eaeef2", linewidth=0.8)
    axes.set_axisbelow(True)


def _ticks(low: float, high: float) -> list[float]:
    return [
        tick
        for tick in MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(low, high)
        if low <= tick <= min(high, 1)
    ]


def _label(axes: Axes, points: list[Point]) -> None:
    """Name every point beside it, where the name covers the fewest other points and names."""
    taken = [_covered(axes, point) for point in points]
    for point in sorted(points, key=lambda point: -point.kept):
        x, y = axes.transData.transform((point.learned, point.kept))
        color = _COLORS.get(point.method, _GREY)
        text = axes.annotate(
            point.method, (x, y), xycoords="figure pixels", fontsize=8.5, color=color, va="center",
            fontweight="bold" if point.method == "agcl" else "normal", zorder=2.5,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8},
        )  # fmt: skip
        width = text.get_window_extent().width
        boxes = [
            Bbox.from_bounds(x + side * away - (width if side < 0 else 0), y + up - 6, width, 12)
            for up in range(-60, 61, 12)
            for away in (9, 24, 40)
            for side in (1, -1)
        ]
        inside = [box for box in boxes if _overlap(box, axes.bbox) > box.width * box.height - 1]
        best = min(inside or boxes, key=lambda box: _cost(box, (x, y), taken))
        taken.append(best)
        middle = (best.y0 + best.y1) / 2
        text.set_position((best.x0, middle))
        edge = best.x0 - 1 if best.x0 > x else best.x1 + 1
        if abs(middle - y) > 1 or abs(edge - x) > 10:
            ends = axes.transData.inverted().transform([(x, y), (edge, middle)])
            axes.plot(*ends.T, color=color, linewidth=0.6, zorder=2)


def _cost(box: Bbox, point: tuple[float, float], taken: list[Bbox]) -> float:
    """Pixels of other points and names that it covers, and a little for the way to its point."""
    away = min(abs(box.x0 - point[0]), abs(box.x1 - point[0]))
    covered = sum(_overlap(box, other) for other in taken)
    return 3 * covered + 0.5 * away + abs(box.y0 + 6 - point[1])


def _covered(axes: Axes, point: Point) -> Bbox:
    half = point.interval or 0
    ends = [(point.learned, point.kept - half), (point.learned, point.kept + half)]
    (x, low), (_, high) = axes.transData.transform(ends)
    return Bbox([[x - 4, min(low, high - 8)], [x + 4, max(high, low + 8)]])


def _overlap(one: Bbox, other: Bbox) -> float:
    both = Bbox.intersection(one, other)
    return 0.0 if both is None else both.width * both.height


if __name__ == "__main__":
    main()
