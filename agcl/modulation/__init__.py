"""How importances change the steps of the optimizer."""

from agcl.modulation.gate import gates
from agcl.modulation.optimizer import GatedAdamW, GateOn
from agcl.modulation.projection import bases, leading_directions, project_out

__all__ = ["GateOn", "GatedAdamW", "bases", "gates", "leading_directions", "project_out"]
