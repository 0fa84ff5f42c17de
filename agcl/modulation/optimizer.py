"""AdamW whose whole step is gated and projected, weight decay included."""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from agcl.modulation.projection import taken_out
from agcl.sharding import placed_like, replicated_like

GateOn = Literal["update", "gradient"]
_GATE_STEPS = 255


class GatedAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` with two changes to the step ΔW of protected weights.

    `gate` multiplies it entry by entry: with `on="update"` the finished step (Adam divides by
    the gradient's running size, so a constant factor on the gradient cancels), with
    `on="gradient"` the gradient before Adam and the weight decay, the paper's literal form.
    `basis` then removes input directions from it, ΔW (I - U Uᵀ).

    Sharded parameters have gates and states sharded like them, and whole bases.

    Where the gate is 1 the step equals `torch.optim.AdamW(fused=True)`'s bit for bit; where it is 0
    the weight keeps its bits. Gates are kept in a byte, in steps of 1/255.
    """

    def __init__(
        self,
        params: Iterable[tuple[str, nn.Parameter]],
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
        """`params` are named; `gate` (out, in) and `basis` (in, k) are keyed by those names.

        `transposed` names weights stored (in, out), as GPT-2's are; their gates are (in, out) too.

        Raises `ValueError` for a name that is not among the parameters or a shape that differs.
        """
        named = list(params)
        super().__init__(named, lr, betas, eps, weight_decay, foreach=False)
        self.on = on
        self.gate: dict[nn.Parameter, Tensor] = {}
        self.basis: dict[nn.Parameter, Tensor] = {}
        self.transposed: set[nn.Parameter] = set()
        by_name = dict(named)
        for name, tensor in (gate or {}).items():
            parameter = by_name.get(name)
            if parameter is None or tensor.shape != parameter.shape:
                raise ValueError(f"no parameter {name} of shape {tuple(tensor.shape)} to gate")
            steps = tensor.to(parameter.device).mul(_GATE_STEPS).round_()
            self.gate[parameter] = placed_like(steps.to(torch.uint8), parameter)
        for name, tensor in (basis or {}).items():
            parameter = by_name.get(name)
            if parameter is None or tensor.shape[0] != parameter.shape[name not in transposed]:
                raise ValueError(f"no parameter {name} with {tensor.shape[0]} inputs to project")
            if tensor.shape[1]:
                self.basis[parameter] = replicated_like(tensor.to(parameter.dtype), parameter)
                if name in transposed:
                    self.transposed.add(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step; parameters without a gradient stay."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_one(parameter, parameter.grad, group)
        return loss

    def _step_one(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        stored, basis = self.gate.get(parameter), self.basis.get(parameter)
        if stored is None and basis is None:
            self._adamw(parameter, gradient, group, group["weight_decay"])
            return
        gate = None if stored is None else stored.to(parameter.dtype).div_(_GATE_STEPS)
        before = parameter.clone()
        # lerp returns its ends exactly for weights 0 and 1.
        if gate is not None and self.on == "gradient":
            decayed = before * (1 - group["lr"] * group["weight_decay"])
            torch.lerp(before, decayed, gate, out=parameter)
            self._adamw(parameter, gradient * gate, group, weight_decay=0.0)
        else:
            self._adamw(parameter, gradient, group, group["weight_decay"])
            if gate is not None:
                torch.lerp(before, parameter, gate, out=parameter)
        if basis is not None:
            back = before.sub_(parameter)  # The step with its sign turned.
            parameter.add_(taken_out(back, basis, transposed=parameter in self.transposed))

    def _adamw(
        self,
        parameter: nn.Parameter,
        gradient: Tensor,
        group: dict[str, Any],
        weight_decay: float,
    ) -> None:
        """Torch's own fused AdamW: one pass over weight, gradient and state."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        adamw(
            [parameter],
            [gradient],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=weight_decay,
            eps=group["eps"],
            maximize=False,
        )
