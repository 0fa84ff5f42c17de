"""Renders the templates of this folder: the HTML report and the Markdown model card."""

from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup


def render(template: str, *, escape: bool, **values: Any) -> str:
    """Render a template; `escape` makes all inserted text safe for HTML."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=escape,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"score": score, "code": code, "inline": _inline}
    return environment.get_template(template).render(values)


def score(value: float | None, digits: int = 3) -> str:
    """Format a score; a rounded zero has no sign."""
    return "–" if value is None else f"{round(value, digits) + 0.0:.{digits}f}"


def code(text: str) -> str:
    """Markdown code for text that a user wrote, so that nothing in it acts as Markdown or HTML.

    Backticks would end the code, pipes the table cell and line breaks the paragraph.
    """
    line = " ".join(text.split()).replace("`", "'").replace("|", "/")
    return f"`{line}`" if line else ""


def _inline(svg: str, label: str) -> Markup:
    from pipeline.results.drawing import inline  # Imports matplotlib, which a model card needs not.

    return Markup(inline(svg, label))
