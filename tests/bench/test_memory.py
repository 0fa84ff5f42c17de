"""The memory that stages take, against what the formula of `agcl plan` says."""

import pytest

from bench.memory import MIDDLE, compare, random_llama


@pytest.mark.slow
def test_a_protected_training_and_an_attribution_take_what_was_predicted(tmp_path, monkeypatch):
    # Otherwise malloc keeps what was freed, and the peak tells of its history.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "200000")
    model = random_llama(tmp_path / "model", MIDDLE)
    for found in compare(model, tmp_path, words=48, settings=()):
        assert found.ratio == pytest.approx(1, abs=0.15), found
