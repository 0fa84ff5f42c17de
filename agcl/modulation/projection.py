"""Projection: updates that do not change a layer's outputs for old tasks' inputs.

Prior art: Gradient Projection Memory (Saha 2021), Adam-NSCL (Wang 2021). New here: inputs are
weighted by the relevance that passes through them.
"""

from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from agcl.files import tensor_file
from agcl.importance import Importance

_KIND = "bases"


def bases(
    past: Sequence[Importance],
    *,
    energy: float,
    known: Mapping[str, Tensor] | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """Input directions to protect, per weight: (in, k) with orthonormal columns, float32, CPU.

    The fewest leading eigenvectors of the past tasks' summed moments that hold the fraction
    `energy` of the trace, in [0, 1]; k = 0 for energy 0. `known` are directions that are protected
    anyway, such as the base model's: they come first, what they hold counts toward `energy`, and
    only the rest is decomposed, as GPM adds a task's directions (Saha 2021, eqs. 8 and 9). Computed
    on `device`. Raises `ValueError` for another energy, without importances, and for an importance
    without moments.
    """
    if not 0 <= energy <= 1:
        raise ValueError(f"energy is a fraction in [0, 1], not {energy}")
    if not past:
        raise ValueError("no importance of a past task to protect")
    if not all(i.moments for i in past):
        raise ValueError("an importance has no input moments; projection needs them")
    known = known or {}
    return {
        # Summed in float64, one task at a time; decomposed in float32, which takes half the time.
        name: leading_directions(
            reduce(torch.add, (i.moments[name].to(device).double() for i in past)).float(),
            energy,
            known.get(name),
        ).cpu()
        for name in past[0].moments
    }


def save_bases(
    basis: Mapping[str, Tensor], file: Path | str, *, header: Mapping[str, Any] | None = None
) -> None:
    """Write bases to one file atomically, in float32; `header` is JSON, for the reader."""
    tensors = {name: tensor.detach().to("cpu", torch.float32) for name, tensor in basis.items()}
    tensor_file.write(Path(file), tensors, _KIND, header or {})


def load_bases(file: Path | str) -> dict[str, Tensor]:
    """Read the bases of `save_bases`, on the CPU.

    Raises `InputError` naming the file if it is not a file of bases or its checksum is wrong.
    """
    file = Path(file)
    tensor_file.verify(file, _KIND)
    stored, _ = tensor_file.open_file(file, _KIND)
    with stored:
        return {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118


def random_bases(like: Mapping[str, Tensor], *, seed: int) -> dict[str, Tensor]:
    """Random orthonormal directions, as many per weight as in `like`: the projection's control."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.linalg.qr(torch.randn(basis.shape, generator=generator))[0]
        for name, basis in like.items()
    }


def leading_directions(moment: Tensor, energy: float, known: Tensor | None = None) -> Tensor:
    """The fewest leading eigenvectors of a symmetric PSD matrix that hold `energy` of its trace.

    With `known` directions (in, k): these, and the fewest orthogonal to them that are missing.
    """
    taken = 0 if known is None else known.shape[1]
    held_before = moment.new_zeros((), dtype=torch.float64)
    rest = moment
    if taken:
        known = cast(Tensor, known).to(moment.device, torch.float64)
        wide = moment.double()
        held_before = (known * (wide @ known)).sum().clamp(min=0)
        wide = wide - known @ (known.T @ wide)
        rest = (wide - (wide @ known) @ known.T).to(moment.dtype)
    ascending: tuple[Tensor, Tensor] = torch.linalg.eigh(rest)
    values, vectors = ascending[0].flip(0).clamp(min=0), ascending[1].flip(1)
    trace = values.sum() + held_before
    rank = 0
    if energy > 0 and trace > 0 and held_before < energy * trace:
        held = (held_before + values.double().cumsum(0)) / trace
        # Where `energy` is 1, eigenvalues that are nothing but rounding would count as well.
        real = int((values > values[0] * len(moment) * torch.finfo(values.dtype).eps).sum())
        rank = min(int((held < energy).sum()) + 1, real)
    if not taken:
        return vectors[:, :rank].float().contiguous()
    # Orthonormal again: eigenvectors with small eigenvalues may reach into the known directions.
    together = torch.cat([cast(Tensor, known), vectors[:, :rank].double()], 1)
    orthonormal: Tensor = torch.linalg.qr(together)[0]
    return orthonormal.float().contiguous()


def projected_part(update: Tensor, basis: Tensor, *, transposed: bool = False) -> Tensor:
    """ΔW U Uᵀ, the part of an update that projection removes, without forming U Uᵀ.

    `update` is ΔW (out, in), or (in, out) if `transposed`; `basis` is U (in, k).
    """
    if transposed:
        return basis @ (basis.T @ update)
    return (update @ basis) @ basis.T
