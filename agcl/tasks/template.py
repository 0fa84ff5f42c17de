"""Templates for prompts and answers: text with column names in braces, `{question}\\nAnswer:`."""

from collections.abc import Mapping
from string import Formatter
from typing import Any

from agcl.errors import InputError
from agcl.tasks.records import text


def columns(template: str) -> list[str]:
    """The columns that a template names. Raises `InputError` for an invalid template."""
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise InputError(f"template {template!r}: {error}; write {{{{ for a brace") from None
    if any(column == "" or spec or conversion for _, column, spec, conversion in parts):
        raise InputError(f"template {template!r}: only {{column}} is allowed in braces")
    return [column for _, column, _, _ in parts if column is not None]


def render(template: str, record: Mapping[str, Any], place: str) -> str:
    """Fill in a record's columns; empty, whatever the template adds, if all of them are blank.

    Raises `InputError` naming location and column if one is missing. The text in braces is taken as
    a column name, so a template cannot access attributes of values.
    """
    parts = [
        (literal, None if column is None else text(record, column, place))
        for literal, column, _, _ in Formatter().parse(template)
    ]
    values = [value for _, value in parts if value is not None]
    if values and not any(map(str.strip, values)):
        return ""
    return "".join(literal + (value or "") for literal, value in parts)
