"""Variants of what another quick test holds already: run with `pytest -m slow`."""

from typing import Any

import pytest


def slow(*values: Any) -> list[Any]:
    """Values of one parameter whose tests are left out by default."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]
