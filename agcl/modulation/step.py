"""What protection does to a finished optimizer step: undo a share of it, remove directions from it.

Used inside `GatedAdamW`, and around any other optimizer by `agcl.integrations.transformers`.
"""

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor, nn

from agcl.modulation.projection import projected_part
from agcl.parallel.sharding import local, placed_like, replicated_like

_LEVELS = 255
_CHUNK_ENTRIES = 2**24
"""Approximate number of weights per chunk on a GPU; a float32 copy takes 64 MB."""


class StepProtection:
    """Gates and bases of parameters, and what they leave of a step.

    Gates are stored in one byte, in steps of 1/255, and sharded like their parameters; bases are
    replicated.
    """

    def __init__(
        self,
        by_name: Mapping[str, nn.Parameter],
        *,
        gate: Mapping[str, Tensor] | None = None,
        basis: Mapping[str, Tensor] | None = None,
        transposed: Collection[str] = (),
    ) -> None:
        """`gate` (out, in) and `basis` (in, k) are keyed by the parameters' names.

        `transposed` names weights stored (in, out); their gates are (in, out) too. Raises
        `ValueError` for an unknown name, a wrong shape, and a parameter in half precision.
        """
        self.held: dict[Tensor, Tensor] = {}
        """Share of a gated weight's step that is undone: 1 - gate, in steps of 1/255."""
        self.basis: dict[Tensor, Tensor] = {}
        self.transposed: set[Tensor] = set()
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

    def chunks(self, parameters: Collection[Tensor]) -> Iterator[list[Tensor]]:
        """The protected ones among the parameters, in chunks for `undo` and `project`.

        In a chunk either all have a gate or all have only a basis.
        """
        yield from _chunks([p for p in parameters if p in self.held])
        yield from _chunks([p for p in parameters if p in self.basis and p not in self.held])

    def shares(self, parameters: list[Tensor]) -> list[Tensor]:
        """The shares of a chunk's steps that its gates undo; empty for a chunk without gates."""
        gated = [p for p in parameters if p in self.held]
        shares = copies([self.held[p] for p in gated], like=gated)
        if shares:
            torch._foreach_div_(shares, _LEVELS)
        return shares

    def restrict(self, parameters: list[Tensor], before: list[Tensor]) -> None:
        """Restrict the finished steps of a chunk, in place: the gates first, then the bases.

        `before` are the values before the step; overwritten.
        """
        if shares := self.shares(parameters):
            undo(parameters, before, shares)
        self.project(parameters, before)

    def project(self, parameters: list[Tensor], before: list[Tensor]) -> None:
        """Remove the bases' directions from a chunk's finished steps. Overwrites `before`."""
        based = [(p, old) for p, old in zip(parameters, before, strict=True) if p in self.basis]
        if not based:
            return
        moved, negative_steps = [p for p, _ in based], [old for _, old in based]
        torch._foreach_sub_(negative_steps, moved)
        removed = [
            projected_part(step, self.basis[p], transposed=p in self.transposed)
            for p, step in zip(moved, negative_steps, strict=True)
        ]
        torch._foreach_add_(moved, removed)

    def follow_parameters(self) -> None:
        """Move gates and bases to the parameters' devices: a Trainer may move the model late."""
        for protection in (self.held, self.basis):
            for parameter, tensor in protection.items():
                if tensor.device != parameter.device:
                    protection[parameter] = tensor.to(parameter.device)


def undo(parameters: list[Tensor], before: list[Tensor], shares: list[Tensor]) -> None:
    """Take back these shares of the steps from `before`, in place; 0 and 1 are exact."""
    # lerp returns its endpoints exactly for weights 0 and 1.
    torch._foreach_lerp_(parameters, before, shares)


def copies(tensors: list[Tensor], *, like: list[Tensor]) -> list[Tensor]:
    """Copies with the dtype and placement of `like`; on a GPU one kernel makes them all."""
    made = [torch.empty_like(each) for each in like]
    if made:
        torch._foreach_copy_([local(each) for each in made], [local(each) for each in tensors])
    return made


def _full_precision(by_name: Mapping[str, nn.Parameter], name: str) -> nn.Parameter | None:
    parameter = by_name.get(name)
    if parameter is None and any(n.startswith("base_model.model.") for n in by_name):
        raise ValueError("of a PEFT model, pass model.get_base_model().named_parameters()")
    if parameter is not None and parameter.dtype in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"{name} is in {parameter.dtype}, but only float32 weights can be protected: load the "
            "model with dtype=torch.float32, or cast an adapter to it (bf16=True of a Trainer is "
            "fine)"
        )
    return parameter


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
