"""What a train stage protects, and the check that the protection held."""

import json

import pytest
import torch
from reference import tiny

from pipeline.stages.files import CHECKS
from pipeline.stages.fit import freeze, write_checks
from pipeline.stages.protection import Protection

CONFIG = {"epochs": 1, "batch_size": 1, "learning_rate": 1e-2, "optimizer": "adamw"}


@pytest.fixture
def gated():
    """A model of two layers, the first of which is least protected, and what protects it."""
    model = tiny.llama()
    gate = {
        name: torch.full_like(weight, 1.0 if ".0." in name else 0.1)
        for name, weight in model.named_parameters()
        if "proj" in name
    }
    protection = Protection(gate=gate)
    protection.remember(model)
    return model, protection


def move(model, protection, steps=1.0):
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name in protection.gate and weight.requires_grad:
                weight += steps * 1e-2 * protection.gate[name]


def test_frozen_weights_say_nothing_about_the_gate(gated, tmp_path):
    """They do not move, though no gate holds them back."""
    model, protection = gated
    freeze(model, protection, {"layers": [0], "ungated": False})
    move(model, protection)
    write_checks(model, protection, CONFIG, 1, tmp_path)
    movement = json.loads((tmp_path / CHECKS).read_text())["movement_by_decile"]
    assert movement[0] == pytest.approx(movement[-1], rel=0.1)


def test_a_gate_of_unequal_steps_is_not_compared(gated, tmp_path):
    """SGD moves weights with large gradients most, which a gate may not outweigh."""
    model, protection = gated
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight += 1e-2 * protection.gate.get(name, 0) * (1 if ".0." in name else 1000)
    write_checks(model, protection, {**CONFIG, "optimizer": "sgd"}, 1, tmp_path)
    with pytest.raises(ArithmeticError, match="the gate does not hold"):
        write_checks(model, protection, CONFIG, 1, tmp_path)
