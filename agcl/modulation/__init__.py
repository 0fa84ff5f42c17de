"""How importances modulate the optimizer's steps."""

from agcl.modulation.gate import gates
from agcl.modulation.optimizer import GatedAdamW, GateOn
from agcl.modulation.penalty import quadratic_penalty
from agcl.modulation.projection import bases, leading_directions, project_out, random_bases

__all__ = [
    "GateOn",
    "GatedAdamW",
    "bases",
    "gates",
    "leading_directions",
    "project_out",
    "quadratic_penalty",
    "random_bases",
]
