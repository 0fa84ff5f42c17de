"""AdamW with its whole step gated and projected, weight decay included."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from agcl.modulation.projection import projected_part
from agcl.parallel.sharding import local, placed_like, replicated_like

GateOn = Literal["update", "gradient"]
_LEVELS = 255
_CHUNK_ENTRIES = 2**24
"""Approximate number of weights per chunk on a GPU; a float32 copy takes 64 MB."""


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

        `transposed` names weights stored (in, out), such as GPT-2's; their gates are (in, out) too.
        Raises `ValueError` for an unknown parameter name, a wrong shape, and for a protected
        parameter in half precision, where rounding would undo the protection.
        """
        named = list(params)
        if on not in get_args(GateOn):
            raise ValueError(f"on must be one of {get_args(GateOn)}, not {on!r}")
        super().__init__(named, lr, betas, eps, weight_decay, foreach=False)
        self.on = on
        self.held: dict[Tensor, Tensor] = {}
        """Fraction of a gated weight's step that is undone: 1 - gate, in steps of 1/255."""
        self.basis: dict[Tensor, Tensor] = {}
        self.transposed: set[Tensor] = set()
        by_name = dict(named)
        for name, tensor in (gate or {}).items():
            parameter = _full_precision(by_name, name)
            if parameter is None or tensor.shape != parameter.shape:
                raise ValueError(f"no parameter {name} of shape {tuple(tensor.shape)} to gate")
            levels = (1 - tensor.to(parameter.device)).mul_(_LEVELS).round_()
            self.held[parameter] = placed_like(levels.to(torch.uint8), parameter)
        for name, tensor in (basis or {}).items():
            parameter = _full_precision(by_name, name)
            if parameter is None or tensor.shape[0] != parameter.shape[name not in transposed]:
                raise ValueError(f"no parameter {name} with {tensor.shape[0]} inputs to project")
            if tensor.shape[1]:
                self.basis[parameter] = replicated_like(tensor.to(parameter.dtype), parameter)
                if name in transposed:
                    self.transposed.add(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step. Parameters without a gradient do not change."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._follow_parameters()
        for group in self.param_groups:
            moving: list[Tensor] = [p for p in group["params"] if p.grad is not None]
            gated = [p for p in moving if p in self.held]
            projected = [p for p in moving if p in self.basis and p not in self.held]
            protected = {*gated, *projected}
            free = [p for p in moving if p not in protected]
            self._adamw(free, _gradients(free), group, group["weight_decay"])
            for chunk in (*_chunks(gated), *_chunks(projected)):
                self._protected_step(chunk, group)
        return loss

    def _follow_parameters(self) -> None:
        """Move gates and bases to the parameters' devices: a Trainer may move the model late."""
        for protection in (self.held, self.basis):
            for parameter, tensor in protection.items():
                if tensor.device != parameter.device:
                    protection[parameter] = tensor.to(parameter.device)

    def _protected_step(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Step parameters that either all have a gate or all have only a basis."""
        before = _copies(parameters, like=parameters)
        gated = [p for p in parameters if p in self.held]
        held = _copies([self.held[p] for p in gated], like=gated)
        if held:
            torch._foreach_div_(held, _LEVELS)
        gradients, decay = _gradients(parameters), group["weight_decay"]
        # lerp returns its endpoints exactly for weights 0 and 1.
        if held and self.on == "gradient":
            torch._foreach_mul_(parameters, 1 - group["lr"] * decay)
            torch._foreach_lerp_(parameters, before, held)
            scaled = [g * (1 - share) for g, share in zip(gradients, held, strict=True)]
            self._adamw(parameters, scaled, group, weight_decay=0.0)
        else:
            self._adamw(parameters, gradients, group, decay)
            if held:
                torch._foreach_lerp_(parameters, before, held)
        based = [(p, old) for p, old in zip(parameters, before, strict=True) if p in self.basis]
        if based:
            moved, negative_steps = [p for p, _ in based], [old for _, old in based]
            torch._foreach_sub_(negative_steps, moved)
            removed = [
                projected_part(step, self.basis[p], transposed=p in self.transposed)
                for p, step in zip(moved, negative_steps, strict=True)
            ]
            torch._foreach_add_(moved, removed)

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


def _full_precision(by_name: Mapping[str, nn.Parameter], name: str) -> nn.Parameter | None:
    parameter = by_name.get(name)
    if parameter is None and any(n.startswith("base_model.model.") for n in by_name):
        raise ValueError("of a PEFT model, pass model.get_base_model().named_parameters()")
    if parameter is not None and parameter.dtype in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"{name} is in {parameter.dtype}, but only float32 weights can be protected: load the "
            "model with dtype=torch.float32 (bf16=True of a Trainer is fine)"
        )
    return parameter


def _copies(tensors: list[Tensor], *, like: list[Tensor]) -> list[Tensor]:
    """Copies with the dtype and placement of `like`; on a GPU one kernel makes them all."""
    copies = [torch.empty_like(each) for each in like]
    if copies:
        torch._foreach_copy_([local(each) for each in copies], [local(each) for each in tensors])
    return copies


def _gradients(parameters: list[Tensor]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def _chunks(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Chunks of about `_CHUNK_ENTRIES` weights on a GPU, single parameters on a CPU."""
    # On a GPU kernel launches dominate, so many parameters are stepped at once. Chunks bound the
    # extra memory of a protected step: copies of the chunk's weights and gates.
    chunk: list[Tensor] = []
    for parameter in parameters:
        chunk.append(parameter)
        if not parameter.is_cuda or sum(p.numel() for p in chunk) >= _CHUNK_ENTRIES:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
