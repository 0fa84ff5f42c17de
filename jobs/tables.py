"""Tables in the terminal."""

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from pipeline.results.results import METRIC_TITLES

_MOST = 79
"""Columns that a title may ask for."""


def table(
    text: Sequence[str],
    numbers: Sequence[str],
    *,
    title: str = "",
    **settings: Any,
) -> Table:
    """An empty table with columns of text and then of numbers, narrow enough for 80 characters.

    Text is folded before a number is cut. A long `title` (rich markup) makes it wider.
    """
    made = Table(
        title=title or None,
        min_width=min(Text.from_markup(title).cell_len, _MOST),
        box=SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
        title_justify="left",
        title_style="bold",
        **settings,
    )
    for column in text:
        made.add_column(column, overflow="fold")
    for column in numbers:
        made.add_column(column, no_wrap=True, justify="right")
    return made


def heading(key: str) -> str:
    """A metric's title as a narrow column has it: lowercase, a line per word."""
    return METRIC_TITLES[key].lower().replace(" ", "\n")


def number(value: float | None) -> str:
    """A score as it is shown."""
    return "-" if value is None else f"{value:.3f}"
