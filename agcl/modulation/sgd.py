"""SGD with momentum, gated and projected: where a gate on the gradient is what the paper says."""

from collections.abc import Callable, Collection, Mapping
from typing import cast

import torch
from torch import Tensor

from agcl.modulation.optimizer import GateOn, Named
from agcl.modulation.step import StepProtection, copies, undo


class GatedSGD(torch.optim.SGD):
    """`torch.optim.SGD` with the changes to a step that `GatedAdamW` makes to AdamW's.

    Under SGD a constant gate on the gradient scales the whole step, momentum included, so that it
    differs from a gate on the update only while gates change; under Adam it cancels. Weight decay
    is decoupled as in AdamW, W ← (1 - lr · decay) W, and is gated and projected too.

    Without a gate, basis or weight decay, a step is bit-identical to that of `torch.optim.SGD`. A
    step needs memory for a copy of all protected weights.
    """

    def __init__(
        self,
        params: Collection[Named],
        *,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        gate: Mapping[str, Tensor] | None = None,
        basis: Mapping[str, Tensor] | None = None,
        transposed: Collection[str] = (),
        on: GateOn = "update",
    ) -> None:
        """See `GatedAdamW` for the arguments and errors."""
        named = list(params)
        super().__init__([parameter for _, parameter in named], lr=lr, momentum=momentum)
        self.on, self.decay = on, weight_decay
        self.protection = StepProtection(dict(named), gate=gate, basis=basis, transposed=transposed)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step. Parameters without a gradient do not change."""
        loss = None
        if closure is not None:  # First: it computes the gradients that are protected below.
            with torch.enable_grad():
                loss = closure()
        protection = self.protection
        protection.follow_parameters()
        moving = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        held = []
        for chunk in protection.chunks([p for p in moving if protection.covers(p)]):
            values = [piece.of(piece.parameter) for piece in chunk]
            shares = protection.shares(chunk, values) if self.on == "gradient" else []
            held.append((chunk, values, copies(values, like=values), shares))
        if self.decay and moving:
            torch._foreach_mul_(moving, 1 - self.param_groups[0]["lr"] * self.decay)
        for chunk, values, before, shares in held:
            if shares:
                undo(values, before, shares)
                for piece, share in zip(chunk, shares, strict=True):
                    piece.of(cast(Tensor, piece.parameter.grad)).mul_(1 - share)
        super().step()
        for chunk, values, before, shares in held:
            if shares:
                protection.project(chunk, values, before)
            else:
                protection.restrict(chunk, values, before)
        return loss
