"""How importances modulate the optimizer's steps."""

from agcl.modulation.gate import gates
from agcl.modulation.optimizer import GatedAdamW, GateOn
from agcl.modulation.penalty import quadratic_penalty
from agcl.modulation.projection import bases, random_bases

__all__ = [
    "GateOn",
    "GatedAdamW",
    "bases",
    "gates",
    "quadratic_penalty",
    "random_bases",
]
