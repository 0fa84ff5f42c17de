"""The gate: slows weights that past tasks relied on."""

from collections.abc import Sequence

import torch
from torch import Tensor

from agcl.importance import Importance, scaled


def gates(
    past: Sequence[Importance], *, strength: float, exponent: float, log_scale: float
) -> dict[str, Tensor]:
    """G = 1 - min(1, α (max over past tasks of s)^γ) per weight, in [0, 1], float32.

    s is `importance.scaled` with κ = `log_scale`; α is `strength`, γ `exponent`. The paper's
    eq. 12 has α = γ = 1. Raises `ValueError` unless α ≥ 0, γ > 0 and κ > 0, without importances,
    and for an importance without entries.
    """
    if not (strength >= 0 and exponent > 0 and log_scale > 0):
        raise ValueError(
            f"strength must be at least 0, exponent and log_scale positive, not {strength}, "
            f"{exponent} and {log_scale}"
        )
    if not past or not all(i.entries for i in past):
        raise ValueError("a gate needs at least one importance of a past task, all with entries")

    def gate(name: str) -> Tensor:
        maximum = scaled(past[0].entries[name], log_scale)
        for importance in past[1:]:
            torch.maximum(maximum, scaled(importance.entries[name], log_scale), out=maximum)
        return maximum.pow_(exponent).mul_(strength).clamp_(max=1).neg_().add_(1)

    return {name: gate(name) for name in past[0].entries}
