"""Fixtures for tests that start a `Trainer`."""

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="package")
def few_objects() -> Iterator[None]:
    """Every Trainer collects garbage before it trains: among all imports that takes most of its
    time here."""
    gc.freeze()
    yield
    gc.unfreeze()
