"""Second moments of layer inputs, kept as their leading directions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

_FEWEST = 256
"""An input may keep this many directions, or a quarter of its width if that is more."""
_ROUNDING = 1e-5
"""A sum of energies this close to the trace is all of it."""


@dataclass(frozen=True)
class Moment:
    """The second moment C = Σ_t r_t d_t d_tᵀ (in, in) of an input, cut to its leading directions.

    C minus the kept part is positive semidefinite, so the nuclear norm of that error is exactly
    `trace` minus the sum of `energies` (up to rounding for a sketch that was not cut).
    """

    directions: Tensor
    """(in, r), orthonormal columns, leading first."""
    energies: Tensor
    """(r,), float64, descending: how much of C each direction holds."""
    trace: float
    """Trace of C itself, not of what is kept."""

    @property
    def kept(self) -> float:
        """Share of the trace that the directions hold; 1 for C = 0."""
        return float(self.energies.sum()) / self.trace if self.trace else 1.0

    def matrix(self) -> Tensor:
        """The kept part of C, (in, in)."""
        scaled = self.directions * self.energies.to(self.directions)
        return scaled @ self.directions.T

    def to(self, device: torch.device | str) -> "Moment":
        """The moment on another device."""
        return Moment(self.directions.to(device), self.energies.to(device), self.trace)


def of_matrix(matrix: Tensor, trace: float, *, keep: float) -> Moment:
    """Cut a symmetric positive semidefinite matrix, for `keep` see `attribute`."""
    ascending: tuple[Tensor, Tensor] = torch.linalg.eigh(matrix)
    values, vectors = ascending[0].flip(0), ascending[1].flip(1)
    # Eigenvalues that are nothing but rounding would count where `keep` is 1. Rounding grows with
    # the root of the width; a bound by the width would drop real directions of little energy.
    least = values[0].clamp(min=0) * len(matrix) ** 0.5 * torch.finfo(values.dtype).eps
    real = int((values > least).sum())
    return _cut(vectors[:, :real], values[:real].double(), trace, keep)


def of_sketch(sketch: Tensor, test: Tensor, trace: float, *, keep: float) -> Moment:
    """Cut a matrix C that is known only through `sketch` = C `test`; both are (in, columns).

    Uses Nyström's approximation C T (Tᵀ C T)⁺ (C T)ᵀ (Tropp 2017, "Fixed-rank approximation of a
    positive-semidefinite matrix from streaming data"), which is exact if the rank of C is at most
    the number of columns s. Otherwise its best rank-k approximation has an expected nuclear-norm
    error of at most 1 + k / (s - k - 1) times that of the best one of C (theorem 4.1).
    """
    core = test.T.double() @ sketch.double()
    values, vectors = torch.linalg.eigh((core + core.T) / 2)
    # Dividing by eigenvalues that are nothing but the sketch's rounding would amplify it.
    real = values > values[-1].clamp(min=0) * 10 * torch.finfo(sketch.dtype).eps
    factor = sketch @ (vectors[:, real] * values[real].rsqrt()).to(sketch)
    return of_factor(factor, trace, keep=keep)


def of_factor(factor: Tensor, trace: float, *, keep: float) -> Moment:
    """Cut F Fᵀ for a factor F (in, columns)."""
    gram = factor.double().T @ factor.double()
    ascending: tuple[Tensor, Tensor] = torch.linalg.eigh(gram)
    values, vectors = ascending[0].flip(0), ascending[1].flip(1)
    exact, given = (torch.finfo(dtype).eps for dtype in (torch.float64, factor.dtype))
    least = values[:1].clamp(min=0) * max(len(factor) * exact, len(factor) ** 0.5 * given)
    real = int((values > least).sum())
    vectors = (factor.double() @ (vectors[:, :real] * values[:real].rsqrt())).to(factor.dtype)
    return _cut(vectors, values[:real], trace, keep)


def most_directions(width: int) -> int:
    """How many directions of an input are kept at most, unless all are."""
    return max(_FEWEST, width // 4)


def summed(moments: Sequence[Moment], *, keep: float) -> Moment:
    """Sum moments of one input and cut the sum; a single moment is returned unchanged.

    The errors of the parts and of the cut add up. Raises `ValueError` without moments.
    """
    if not moments:
        raise ValueError("no moments to sum")
    if len(moments) == 1:
        return moments[0]
    factor = torch.cat([m.directions * m.energies.sqrt().to(m.directions) for m in moments], 1)
    trace = sum(m.trace for m in moments)
    if factor.shape[1] < len(factor):
        return of_factor(factor, trace, keep=keep)
    return of_matrix(factor @ factor.T, trace, keep=keep)


def leading(moment: Moment, energy: float, known: Tensor | None = None) -> Tensor:
    """The fewest leading directions that hold `energy` of the trace, or all that are kept: (in, k).

    With `known` directions (in, k), these come first, followed by the fewest leading directions of
    the moment with `known` projected out on both sides that, together with what `known` already
    holds of what is stored of the moment, hold `energy` (GPM, Saha 2021, eqs. 8 and 9).
    """
    if known is None or not known.shape[1]:
        rank = _fewest(moment.energies, energy * moment.trace)
        return moment.directions[:, :rank].contiguous()
    # In float64: small energies would drown in the rounding of what the known directions hold.
    known = known.to(moment.directions.device, torch.float64)
    factor = moment.directions.double() * moment.energies.sqrt()
    inside = known.T @ factor
    rest = of_factor(factor - known @ inside, moment.trace, keep=1)
    rank = _fewest(rest.energies, energy * moment.trace - float(inside.square().sum()))
    # Orthonormal again: directions of little energy may reach into the known ones.
    together = torch.cat([known, rest.directions[:, :rank]], 1)
    orthonormal: Tensor = torch.linalg.qr(together)[0]
    return orthonormal.to(moment.directions.dtype).contiguous()


def orthonormal(directions: Tensor) -> Tensor:
    """Make rounded directions orthonormal again, in float32; the first k keep their span."""
    return cast(Tensor, torch.linalg.qr(directions.float())[0])


def _cut(directions: Tensor, energies: Tensor, trace: float, keep: float) -> Moment:
    """Keep the fewest directions that hold the share `keep`, up to the largest number."""
    total = float(energies.sum())
    # What only rounding took from the energies is not missing: no direction holds it.
    trace = total if abs(trace - total) <= _ROUNDING * trace else trace
    rank = len(energies)
    if keep < 1:
        rank = min(_fewest(energies, keep * trace), most_directions(len(directions)))
    return Moment(directions[:, :rank].contiguous(), energies[:rank].contiguous(), trace)


def _fewest(energies: Tensor, wanted: float) -> int:
    """How many of the leading energies add up to what is wanted; all, if they do not."""
    if wanted <= 0:
        return 0
    return min(int((energies.cumsum(0) < wanted).sum()) + 1, len(energies))
