"""The quadratic penalty of elastic weight consolidation (EWC, Kirkpatrick 2017)."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from agcl.importance import Importance
from agcl.parallel.sharding import placed_like, whole


def quadratic_penalty(
    parameters: Mapping[str, nn.Parameter], past: Sequence[Importance], *, strength: float
) -> Callable[[], Tensor]:
    """A function that adds the gradient of ½ λ Σ_i F_i (θ_i - θ*_i)² to `.grad` and returns its
    value; λ is the `strength`.

    F is the sum over past tasks of the positive importance entries, unscaled, and θ* the current
    parameters. This is the online form with one anchor (Schwarz 2018, γ = 1): memory does not grow
    with the number of tasks. It holds one copy of the penalized weights, and F in float32; of
    bfloat16 weights the penalty is computed in float32 too, its gradient rounded once. Raises
    `ValueError` for a negative strength, without importances, and for an importance without
    entries or of other parameters.
    """
    if not strength >= 0:
        raise ValueError(f"strength must be at least 0, not {strength}")
    if not past or not all(i.entries for i in past):
        raise ValueError("a penalty needs at least one importance of a past task, all with entries")
    anchors: dict[str, Tensor] = {}
    fisher: dict[str, Tensor] = {}
    for name, entries in past[0].entries.items():
        parameter = parameters.get(name)
        if parameter is None or entries.shape != parameter.shape:
            raise ValueError(f"no parameter {name} of shape {tuple(entries.shape)} to penalize")
        anchors[name] = parameter.detach().clone()
        exact = torch.promote_types(parameter.dtype, torch.float32)
        fisher[name] = torch.zeros_like(anchors[name], dtype=exact)
        for importance in past:
            fisher[name] += placed_like(importance.entries[name], parameter).clamp(min=0)

    @torch.no_grad()
    def penalise() -> Tensor:
        value = torch.zeros((), device=next(iter(anchors.values())).device)
        for name, anchor in anchors.items():
            parameter = parameters[name]
            if not parameter.requires_grad:  # Frozen: it does not move.
                continue
            moved = parameter.to(fisher[name].dtype) - anchor
            gradient = strength * fisher[name] * moved
            value += 0.5 * whole((gradient * moved).sum())
            if parameter.grad is None:
                parameter.grad = gradient.to(parameter.dtype)
            else:
                parameter.grad.add_(gradient)
        return value

    return penalise
