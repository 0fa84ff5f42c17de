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
    found = []
    for _, column, format_spec, conversion in parts:
        if column == "" or format_spec or conversion:
            raise InputError(f"template {template!r}: only {{column}} is allowed in braces")
        if column is not None:
            found.append(column)
    return found


def render(template: str, record: Mapping[str, Any], place: str) -> str:
    """Fill in a record's columns. Raises `InputError` naming location and column if one is missing.

    The text in braces is taken as a column name, so a template cannot access attributes of values.
    """
    filled = []
    for literal, column, _, _ in Formatter().parse(template):
        filled.append(literal)
        if column is not None:
            filled.append(text(record, column, place))
    return "".join(filled)
