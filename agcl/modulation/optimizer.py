"""AdamW whose whole step is gated and projected, weight decay included."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from agcl.modulation.projection import taken_out
from agcl.parallel.sharding import local, placed_like, replicated_like

GateOn = Literal["update", "gradient"]
_STEPS = 255
_PART_ENTRIES = 2**24
"""Weights, about, whose step is taken at once on a GPU: a copy of them is 64 MB."""


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
        self.held: dict[Tensor, Tensor] = {}
        """How much of a gated weight's step is taken back: 1 - gate, in steps of 1/255."""
        self.basis: dict[Tensor, Tensor] = {}
        self.transposed: set[Tensor] = set()
        by_name = dict(named)
        for name, tensor in (gate or {}).items():
            parameter = by_name.get(name)
            if parameter is None or tensor.shape != parameter.shape:
                raise ValueError(f"no parameter {name} of shape {tuple(tensor.shape)} to gate")
            steps = (1 - tensor.to(parameter.device)).mul_(_STEPS).round_()
            self.held[parameter] = placed_like(steps.to(torch.uint8), parameter)
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
            moving: list[Tensor] = [p for p in group["params"] if p.grad is not None]
            gated = [p for p in moving if p in self.held]
            projected = [p for p in moving if p in self.basis and p not in self.held]
            protected = {*gated, *projected}
            free = [p for p in moving if p not in protected]
            self._adamw(free, _gradients(free), group, group["weight_decay"])
            for part in (*_parts(gated), *_parts(projected)):
                self._protected(part, group)
        return loss

    def _protected(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """The step of parameters that all have a gate, or all have only a basis."""
        before = _copies(parameters, like=parameters)
        gated = [p for p in parameters if p in self.held]
        held = _copies([self.held[p] for p in gated], like=gated)
        if held:
            torch._foreach_div_(held, _STEPS)
        gradients, decay = _gradients(parameters), group["weight_decay"]
        # lerp returns its ends exactly for weights 0 and 1.
        if held and self.on == "gradient":
            torch._foreach_mul_(parameters, 1 - group["lr"] * decay)
            torch._foreach_lerp_(parameters, before, held)
            passed = [g * (1 - share) for g, share in zip(gradients, held, strict=True)]
            self._adamw(parameters, passed, group, weight_decay=0.0)
        else:
            self._adamw(parameters, gradients, group, decay)
            if held:
                torch._foreach_lerp_(parameters, before, held)
        based = [(p, old) for p, old in zip(parameters, before, strict=True) if p in self.basis]
        if based:
            now, back = [p for p, _ in based], [old for _, old in based]
            torch._foreach_sub_(back, now)  # The step with its sign turned.
            taken = [
                taken_out(step, self.basis[p], transposed=p in self.transposed)
                for p, step in zip(now, back, strict=True)
            ]
            torch._foreach_add_(now, taken)

    def _adamw(
        self,
        parameters: list[Tensor],
        gradients: list[Tensor],
        group: dict[str, Any],
        weight_decay: float,
    ) -> None:
        """Torch's own fused AdamW: one pass over weights, gradients and states."""
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


def _copies(tensors: list[Tensor], *, like: list[Tensor]) -> list[Tensor]:
    """Copies of the type of others, which on a GPU are made all at once."""
    made = [torch.empty_like(each) for each in like]
    if made:
        torch._foreach_copy_([local(each) for each in made], [local(each) for each in tensors])
    return made


def _gradients(parameters: list[Tensor]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def _parts(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """On a GPU many at once, as starting its work takes longer than the work; else one by one.

    Copies of a part and of its gates are what protection adds to the memory of a step.
    """
    part: list[Tensor] = []
    for parameter in parameters:
        part.append(parameter)
        if not parameter.is_cuda or sum(p.numel() for p in part) >= _PART_ENTRIES:
            yield part
            part = []
    if part:
        yield part
