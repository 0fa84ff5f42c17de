"""What protection does to a finished optimizer step: undo a share of it, remove directions from it.

Used inside `GatedAdamW`, and around any other optimizer by `agcl.integrations.transformers`.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from agcl.modulation.projection import projected_part
from agcl.modulation.rounding import block_rows
from agcl.parallel.sharding import first_row, local, placed_like, replicated_like

_LEVELS = 255
_MAX_ERROR = 0.05
"""Accepted `_orthonormality_error` of a basis. Rounding to bfloat16 stays below 0.02."""
CHUNK_ENTRIES = 2**24
"""Approximate number of weights per chunk on a GPU; a float32 copy takes 64 MB."""


class Piece(NamedTuple):
    """Rows of a parameter that are stepped at a time; of a sharded one, of this rank's shard."""

    parameter: Tensor
    rows: slice | None = None
    """None is the whole parameter, a `DTensor` if it is sharded."""

    def of(self, tensor: Tensor) -> Tensor:
        """These rows of a tensor placed like the parameter, sharing memory."""
        return tensor if self.rows is None else local(tensor)[self.rows]


class StepProtection:
    """Gates and bases of parameters, which restrict finished optimizer steps.

    Gates are stored in one byte, in steps of 1/255, and sharded like their parameters; bases are
    replicated. Bases of bfloat16 weights are bfloat16 too. That error lets 0.2 % of a step through,
    far less than the rounding of the weights themselves (METHOD.md, section 9).
    """

    def __init__(
        self,
        by_name: Mapping[str, nn.Parameter],
        *,
        gate: Mapping[str, Tensor] | None = None,
        basis: Mapping[str, Tensor] | None = None,
        transposed: Collection[str] = (),
        rounded: bool = False,
    ) -> None:
        """`gate` (out, in) and `basis` (in, k) are keyed by the parameters' names.

        `transposed` names weights stored (in, out); their gates are (in, out) too. `rounded` says
        that bfloat16 weights are stepped in float32 and rounded stochastically. Raises `ValueError`
        for an unknown name, a wrong shape, any other parameter in half precision, and a basis
        whose columns are not orthonormal.
        """
        self.held: dict[Tensor, Tensor] = {}
        """Share of a gated weight's step that is undone: 1 - gate, in steps of 1/255."""
        self.basis: dict[Tensor, Tensor] = {}
        self.transposed: set[Tensor] = set()
        for name, tensor in (gate or {}).items():
            parameter = _protectable(by_name, name, rounded)
            if parameter is None or tensor.shape != parameter.shape:
                raise ValueError(f"no parameter {name} of shape {tuple(tensor.shape)} to gate")
            levels = (1 - tensor.to(parameter.device)).mul_(_LEVELS).round_()
            self.held[parameter] = placed_like(levels.to(torch.uint8), parameter)
        placed: dict[Any, Tensor] = {}  # Weights that read the same input share its directions.
        errors: dict[str, Tensor] = {}
        for name, tensor in (basis or {}).items():
            parameter = _protectable(by_name, name, rounded)
            if parameter is None or tensor.shape[0] != parameter.shape[name not in transposed]:
                raise ValueError(f"no parameter {name} with {tensor.shape[0]} inputs to project")
            if tensor.shape[1]:
                key = (id(tensor), parameter.device, parameter.dtype)
                if key not in placed:
                    placed[key] = replicated_like(tensor.to(parameter.dtype), parameter)
                    errors[name] = _orthonormality_error(local(placed[key]))
                self.basis[parameter] = placed[key]
                if name in transposed:
                    self.transposed.add(parameter)
        _check_orthonormal(errors)

    def covers(self, parameter: Tensor) -> bool:
        """Whether a parameter has a gate or a basis."""
        return parameter in self.held or parameter in self.basis

    def chunks(self, parameters: Collection[Tensor]) -> Iterator[list[Piece]]:
        """The parameters in chunks of pieces, which bound the extra memory of a step.

        In a chunk either all have a gate, or all have only a basis, or none has either.
        """
        gated = [p for p in parameters if p in self.held]
        based = [p for p in parameters if p in self.basis and p not in self.held]
        for alike in (gated, based, [p for p in parameters if not self.covers(p)]):
            yield from _chunks([piece for p in alike for piece in self._pieces(p)])

    def _pieces(self, parameter: Tensor) -> Iterator[Piece]:
        """A parameter's rows, cut where the blocks of rounding are.

        A basis acts on rows, except in a transposed weight, which stays whole.
        """
        if parameter.dim() == 0 or (parameter in self.transposed and parameter in self.basis):
            yield Piece(parameter)
            return
        first, height = first_row(parameter), block_rows(parameter.shape)
        row, rows = 0, len(local(parameter))
        while row < rows:
            end = min(rows, (first + row) // height * height + height - first)
            yield Piece(parameter, slice(row, end))
            row = end

    def shares(self, pieces: list[Piece], values: list[Tensor]) -> list[Tensor]:
        """The shares of a chunk's steps that its gates undo; empty for a chunk without gates."""
        pairs = zip(pieces, values, strict=True)
        gated = [(piece, value) for piece, value in pairs if piece.parameter in self.held]
        kept = [piece.of(self.held[piece.parameter]) for piece, _ in gated]
        shares = copies(kept, like=[value for _, value in gated])
        if shares:
            torch._foreach_div_(shares, _LEVELS)
        return shares

    def restrict(self, pieces: list[Piece], values: list[Tensor], before: list[Tensor]) -> None:
        """Restrict the finished steps of a chunk, in place: the gates first, then the bases.

        `values` are those after the step, `before` those before it, which are overwritten.
        """
        if shares := self.shares(pieces, values):
            undo(values, before, shares)
        self.project(pieces, values, before)

    def project(self, pieces: list[Piece], values: list[Tensor], before: list[Tensor]) -> None:
        """Remove the bases' directions from a chunk's finished steps. Overwrites `before`."""
        based = [
            (piece, value, old)
            for piece, value, old in zip(pieces, values, before, strict=True)
            if piece.parameter in self.basis
        ]
        if not based:
            return
        moved, negative_steps = [value for _, value, _ in based], [old for _, _, old in based]
        torch._foreach_sub_(negative_steps, moved)
        removed = [
            projected_part(
                step,
                self._basis(piece).to(step.dtype),
                transposed=piece.parameter in self.transposed,
            )
            for (piece, _, _), step in zip(based, negative_steps, strict=True)
        ]
        torch._foreach_add_(moved, removed)

    def _basis(self, piece: Piece) -> Tensor:
        basis = self.basis[piece.parameter]
        return basis if piece.rows is None else local(basis)

    def follow_parameters(self) -> None:
        """Move gates and bases to the parameters' devices: a Trainer may move the model late."""
        for protection in (self.held, self.basis):
            for parameter, tensor in protection.items():
                if tensor.device != parameter.device:
                    protection[parameter] = tensor.to(parameter.device)


def undo(values: list[Tensor], before: list[Tensor], shares: list[Tensor]) -> None:
    """Take back these shares of the steps from `before`, in place; 0 and 1 are exact."""
    # lerp returns its endpoints exactly for weights 0 and 1.
    torch._foreach_lerp_(values, before, shares)


def copies(tensors: list[Tensor], *, like: list[Tensor]) -> list[Tensor]:
    """Copies with the dtype and placement of `like`; on a GPU one kernel makes them all."""
    made = [torch.empty_like(each) for each in like]
    if made:
        torch._foreach_copy_([local(each) for each in made], [local(each) for each in tensors])
    return made


def _protectable(
    by_name: Mapping[str, nn.Parameter], name: str, rounded: bool
) -> nn.Parameter | None:
    parameter = by_name.get(name)
    if parameter is None and any(n.startswith("base_model.model.") for n in by_name):
        raise ValueError("of a PEFT model, pass model.get_base_model().named_parameters()")
    refused = (torch.float16,) if rounded else (torch.bfloat16, torch.float16)
    if parameter is not None and parameter.dtype in refused:
        raise ValueError(
            f"{name} is in {parameter.dtype}, but only float32 weights can be protected, and "
            "bfloat16 weights by GatedAdamW with rounding='stochastic': load the model with "
            "dtype=torch.float32, or cast an adapter to it (bf16=True of a Trainer is fine)"
        )
    return parameter


def _orthonormality_error(basis: Tensor) -> Tensor:
    """The largest entry of Uᵀ U z - z for random signs z: 0 if U is orthonormal, about 1 or more
    if a direction occurs twice. Unlike Uᵀ U it costs no more than reading U twice."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(2, (basis.shape[1],), generator=generator).mul_(2).sub_(1)
    basis = basis.float()
    z = signs.to(basis)
    return (basis.T @ (basis @ z) - z).abs().max()


def _check_orthonormal(errors: Mapping[str, Tensor]) -> None:
    if not errors:
        return
    device = next(iter(errors.values())).device
    found = torch.stack([error.to(device) for error in errors.values()]).tolist()  # One sync.
    for name, error in zip(errors, found, strict=True):
        if not error <= _MAX_ERROR:  # NaN compares false.
            raise ValueError(
                f"the basis of {name} is not orthonormal; join bases with torch.linalg.qr"
            )


def _chunks(pieces: list[Piece]) -> Iterator[list[Piece]]:
    """Chunks of about `CHUNK_ENTRIES` weights on a GPU, single pieces on a CPU."""
    # On a GPU kernel launches dominate, so many pieces are stepped at once. Chunks bound the
    # extra memory of a step: copies of the chunk's weights and gates.
    chunk: list[Piece] = []
    entries = 0
    for piece in pieces:
        chunk.append(piece)
        entries += piece.of(piece.parameter).numel()
        if not piece.parameter.is_cuda or entries >= CHUNK_ENTRIES:
            yield chunk
            chunk, entries = [], 0
    if chunk:
        yield chunk
