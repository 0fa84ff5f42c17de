"""The gate: slows weights that past tasks relied on."""

from collections.abc import Sequence

from torch import Tensor

from agcl.importance import Importance, past_maximum


def gates(
    past: Sequence[Importance], *, strength: float, exponent: float, log_scale: float
) -> dict[str, Tensor]:
    """G = 1 - min(1, α (max over past tasks of s)^γ) per weight, in [0, 1], float32.

    s is `importance.scaled` with κ = `log_scale`; α is `strength`, γ `exponent`. The paper's
    eq. 12 has α = γ = 1.
    """
    return {
        name: past_maximum(past, name, log_scale)
        .pow_(exponent)
        .mul_(strength)
        .clamp_(max=1)
        .neg_()
        .add_(1)
        for name in past[0].entries
    }
