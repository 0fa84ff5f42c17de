"""Projection: updates that leave the outputs for old tasks' inputs as they are.

Prior art: Gradient Projection Memory (Saha 2021), Adam-NSCL (Wang 2021). New here: inputs weigh
by the relevance that passes through them.
"""

from collections.abc import Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor

from agcl.importance import Importance


def bases(
    past: Sequence[Importance], *, energy: float, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Per weight the input directions to protect, (in, k) with orthonormal columns, float32.

    They are found on `device` and given on the CPU.

    The moments are summed over past tasks; their leading eigenvectors are taken until they hold
    the share `energy` of the trace. k = 0 for energy 0. Raises `ValueError` for an importance
    without moments.
    """
    missing = [i for i in past if not i.moments]
    if missing:
        raise ValueError("an importance has no input moments; projection needs them")
    return {
        # Summed in float64, one task's at a time; directions are found in half the time in float32.
        name: leading_directions(
            reduce(torch.add, (i.moments[name].to(device).double() for i in past)).float(), energy
        ).cpu()
        for name in past[0].moments
    }


def random_bases(like: Mapping[str, Tensor], *, seed: int) -> dict[str, Tensor]:
    """Random orthonormal directions, as many a weight as `like` has: the projection's control."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.linalg.qr(torch.randn(basis.shape, generator=generator))[0]
        for name, basis in like.items()
    }


def leading_directions(moment: Tensor, energy: float) -> Tensor:
    """The fewest leading eigenvectors of a symmetric PSD matrix with `energy` of its trace."""
    ascending: tuple[Tensor, Tensor] = torch.linalg.eigh(moment)
    values, vectors = ascending[0].flip(0).clamp(min=0), ascending[1].flip(1)
    trace = values.sum()
    if energy <= 0 or trace == 0:
        return vectors[:, :0].float()
    held = values.double().cumsum(0) / trace
    rank = int((held < energy).sum()) + 1
    return vectors[:, :rank].float().contiguous()


def taken_out(update: Tensor, basis: Tensor, *, transposed: bool = False) -> Tensor:
    """ΔW U Uᵀ, what the projection takes out of an update, without forming U Uᵀ.

    `update` is ΔW (out, in), or (in, out) `transposed`, and `basis` U (in, k).
    """
    if transposed:
        return basis @ (basis.T @ update)
    return (update @ basis) @ basis.T


def project_out(update: Tensor, basis: Tensor, *, transposed: bool = False) -> Tensor:
    """ΔW (I - U Uᵀ), shapes as in `taken_out`."""
    return update - taken_out(update, basis, transposed=transposed)
