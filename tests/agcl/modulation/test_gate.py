"""The gate G = 1 - min(1, α s^γ) at values where every term matters."""

from math import log

import pytest
import torch
from reference.moments import whole

from agcl.importance import Importance
from agcl.modulation import gates

NAME = "model.layers.0.mlp.up_proj.weight"


def past(*values):
    return [Importance({NAME: torch.tensor(v)}) for v in values]


def test_gate_by_hand_with_every_parameter_different_from_one():
    entries = [[-5.0, 0.0, 1.0, 4.0]]
    s = log(1 + 15 / 4) / log(16)  # κ = 15: s(4) = 1, s(1) = 0.562
    gate = gates(past(entries), strength=0.7, exponent=2.0, log_scale=15.0)[NAME]
    expected = torch.tensor([[1.0, 1.0, 1 - 0.7 * s**2, 1 - 0.7]])
    torch.testing.assert_close(gate, expected)
    assert gate.dtype == torch.float32


def test_strength_above_one_closes_the_gate_and_never_inverts_it():
    s = log(1 + 15 / 4) / log(16)
    gate = gates(past([[0.0, 1.0, 4.0]]), strength=1.5, exponent=0.5, log_scale=15.0)[NAME]
    torch.testing.assert_close(gate, torch.tensor([[1.0, max(0.0, 1 - 1.5 * s**0.5), 0.0]]))
    assert gate[0, 2] == 0.0


def test_each_entry_takes_the_maximum_over_past_tasks_each_scaled_by_its_own_maximum():
    two = past([[4.0, 0.0, 2.0]], [[0.0, 8.0, 1.0]])
    s = log(1 + 15 / 2) / log(16)
    gate = gates(two, strength=0.5, exponent=3.0, log_scale=15.0)[NAME]
    torch.testing.assert_close(gate, torch.tensor([[0.5, 0.5, 1 - 0.5 * s**3]]))


@pytest.mark.parametrize("entries", [[[0.0, 0.0]], [[-1.0, -2.0]]])
def test_a_weight_without_positive_relevance_moves_freely(entries):
    gate = gates(past(entries), strength=1.0, exponent=0.5, log_scale=1e5)[NAME]
    assert torch.equal(gate, torch.ones(1, 2))


def test_strength_zero_opens_every_gate_exactly():
    gate = gates(past([[3.0, 1.0, -2.0]]), strength=0.0, exponent=0.3, log_scale=1e5)[NAME]
    assert torch.equal(gate, torch.ones(1, 3))


def test_the_importances_are_not_changed():
    importances = past([[3.0, 1.0, -2.0]])
    gates(importances, strength=1.0, exponent=2.0, log_scale=10.0)
    assert torch.equal(importances[0].entries[NAME], torch.tensor([[3.0, 1.0, -2.0]]))


@pytest.mark.parametrize("wrong", [{"strength": -1.0}, {"exponent": 0.0}, {"log_scale": -2.0}])
def test_arguments_out_of_range_are_refused(wrong):
    options = {"strength": 1.0, "exponent": 1.0, "log_scale": 1e5, **wrong}
    with pytest.raises(ValueError, match=next(iter(wrong))):
        gates(past([1.0]), **options)


@pytest.mark.parametrize("importances", [[], [Importance({}, {NAME: whole(torch.eye(2))})]])
def test_a_gate_needs_entries(importances):
    with pytest.raises(ValueError, match="with entries"):
        gates(importances, strength=1.0, exponent=1.0, log_scale=1e5)
