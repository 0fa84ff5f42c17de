"""How importances modulate the optimizer's steps."""

from agcl.modulation.gate import gates
from agcl.modulation.optimizer import GatedAdamW, GateOn
from agcl.modulation.penalty import quadratic_penalty
from agcl.modulation.projection import (
    bases,
    load_bases,
    random_bases,
    save_bases,
    weight_bases,
)
from agcl.modulation.sgd import GatedSGD

__all__ = [
    "GateOn",
    "GatedAdamW",
    "GatedSGD",
    "bases",
    "gates",
    "load_bases",
    "quadratic_penalty",
    "random_bases",
    "save_bases",
    "weight_bases",
]
