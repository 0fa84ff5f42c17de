"""Stochastic rounding of float32 steps into bfloat16 weights.

A bfloat16 weight has 8 significant bits, so rounding to nearest loses every step below about 1/512
of the weight. Stochastic rounding rounds away from 0 with a probability equal to the fraction that
would be cut off, so weights move by their step in expectation (Gupta 2015, arXiv 1502.02551;
Zamirai 2020, arXiv 2010.06192, for bfloat16).
"""

import math
from hashlib import blake2b
from typing import Literal

import torch
from torch import Tensor

Rounding = Literal["nearest", "stochastic"]
BLOCK_ENTRIES = 2**22
_KEPT = -(2**16)
"""Mask of the bits of a float32 that bfloat16 has."""


def block_rows(shape: torch.Size) -> int:
    """Rows of a parameter that are stepped and rounded at a time, about four million weights.

    Many rows are a multiple of 256, so that blocks of `eight_bit` end where they do.
    """
    rows = max(1, BLOCK_ENTRIES // max(1, shape[1:].numel()))
    return rows - rows % 256 if rows > 256 else rows


def noise(key: str, shape: torch.Size, first: int, count: int, device: torch.device) -> Tensor:
    """Random integers in [0, 2^16) for `count` rows, from row `first`, of a parameter of `shape`.

    They depend on the key, the row and the kind of device, not on how the rows are cut or sharded.
    """
    generator = torch.Generator(device)
    rows, height = [], block_rows(shape)
    for start in range(first // height * height, first + count, height):
        size = (min(height, shape[0] - start), *shape[1:])
        number = torch.Size(size).numel()
        digest = blake2b(f"{key}/{start // height}".encode(), digest_size=8).digest()
        generator.manual_seed(int.from_bytes(digest, "big") >> 1)
        # Four numbers from each 64 random bits: on a CPU drawing takes longer than all else.
        bits = torch.empty(-(-number // 4), dtype=torch.int64, device=device)
        bits.random_(-(2**63), None, generator=generator)
        drawn = bits.view(torch.int16)[:number].view(size)
        rows.append(drawn[max(0, first - start) : first + count - start])
    return (rows[0] if len(rows) == 1 else torch.cat(rows)).to(torch.int32).bitwise_and_(0xFFFF)


def round_into(weight: Tensor, values: Tensor, noise: Tensor) -> None:
    """Round float32 `values` stochastically into a bfloat16 `weight`. Overwrites `values`.

    What bfloat16 can hold is not changed. Everything has the shape of `weight`.
    """
    # Bits of the same sign are ordered like numbers: a carry out of the part that is cut off is
    # the next number away from zero, with the probability of that part.
    values.view(torch.int32).add_(noise).bitwise_and_(_KEPT)
    weight.copy_(values)


def gaps(before: Tensor, after: Tensor) -> Tensor:
    """Distance between neighbors in bfloat16 at the larger of two values of a weight, float32."""
    largest = torch.maximum(before.abs(), after.abs()).float()
    return torch.ldexp((largest > 0).float(), torch.frexp(largest).exponent - 8)


def rounding_noise(
    before: Tensor, after: Tensor, steps: int, learning_rate: float = math.inf
) -> Tensor:
    """Bound on the standard deviation of what rounding added to each weight in `steps` steps.

    Errors are independent and have mean 0. Between neighbors with a `gap`, a step of size δ has
    variance at most |δ| gap and at most gap² / 4; Adam's are about as large as the peak
    `learning_rate` or smaller. Zero unless the weights are bfloat16.
    """
    if after.dtype != torch.bfloat16:
        return torch.zeros((), dtype=torch.float32)
    gap = gaps(before, after)
    return (steps * gap * (gap / 4).clamp(max=learning_rate)).sqrt()
