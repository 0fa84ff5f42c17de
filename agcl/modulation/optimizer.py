"""AdamW with its whole step gated and projected, weight decay included."""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from agcl.modulation.step import StepProtection, copies, undo

GateOn = Literal["update", "gradient"]
Named = tuple[str, nn.Parameter]


class GatedAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` with two changes to the step ΔW of protected weights.

    `gate` multiplies element-wise: with `on="update"` the finished step (a constant factor on the
    gradient cancels, since Adam divides by the gradient's running magnitude); with
    `on="gradient"` the gradient before Adam, and the weight decay, which is the paper's form.
    `basis` then removes input directions from the step, ΔW (I - U Uᵀ).

    Where the gate is 1 the step is bit-identical to `torch.optim.AdamW(fused=True)`; where it is 0
    the weight does not change. Gates are stored in one byte, in steps of 1/255. Gates and states
    of sharded parameters are sharded alike; bases are replicated.
    """

    def __init__(
        self,
        params: Iterable[Named] | Iterable[dict[str, Any]],
        *,
        gate: Mapping[str, Tensor] | None = None,
        basis: Mapping[str, Tensor] | None = None,
        transposed: Collection[str] = (),
        on: GateOn = "update",
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        """`params` are named, or groups of named ones: `{"params": [...], "weight_decay": 0.0}`.

        `gate` (out, in) and `basis` (in, k) are keyed by those names. `transposed` names weights
        stored (in, out), such as GPT-2's; their gates are (in, out) too. Raises `ValueError` for
        an unknown parameter name, a wrong shape, and for a protected parameter in half precision,
        where rounding would undo the protection.
        """
        given: list[Any] = list(params)
        if on not in get_args(GateOn):
            raise ValueError(f"on must be one of {get_args(GateOn)}, not {on!r}")
        by_name: dict[str, nn.Parameter] = {}
        for each in given:
            by_name.update(each["params"] if isinstance(each, dict) else [cast(Named, each)])
        super().__init__(given, lr, betas, eps, weight_decay, foreach=False)
        self.on = on
        self.protection = StepProtection(by_name, gate=gate, basis=basis, transposed=transposed)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step. Parameters without a gradient do not change."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.protection.follow_parameters()
        for group in self.param_groups:
            moving: list[Tensor] = [p for p in group["params"] if p.grad is not None]
            chunks = list(self.protection.chunks(moving))
            protected = {p for chunk in chunks for p in chunk}
            free = [p for p in moving if p not in protected]
            self._adamw(free, _gradients(free), group, group["weight_decay"])
            for chunk in chunks:
                self._protected_step(chunk, group)
        return loss

    def _protected_step(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Step a chunk of the protection's."""
        before = copies(parameters, like=parameters)
        gradients, decay = _gradients(parameters), group["weight_decay"]
        held = self.protection.shares(parameters) if self.on == "gradient" else []
        if not held:
            self._adamw(parameters, gradients, group, decay)
            self.protection.restrict(parameters, before)
            return
        torch._foreach_mul_(parameters, 1 - group["lr"] * decay)
        undo(parameters, before, held)
        scaled = [g * (1 - share) for g, share in zip(gradients, held, strict=True)]
        self._adamw(parameters, scaled, group, weight_decay=0.0)
        self.protection.project(parameters, before)

    def _adamw(
        self,
        parameters: list[Tensor],
        gradients: list[Tensor],
        group: dict[str, Any],
        weight_decay: float,
    ) -> None:
        """Torch's fused AdamW: one pass over weights, gradients and states."""
        if not parameters:
            return
        states = [self.state[parameter] for parameter in parameters]
        for parameter, state in zip(parameters, states, strict=True):
            if not state:
                state["step"] = torch.zeros((), device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        adamw(
            parameters,
            gradients,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=weight_decay,
            eps=group["eps"],
            maximize=False,
        )


def _gradients(parameters: list[Tensor]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]
