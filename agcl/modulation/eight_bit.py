"""Adam's running means in one byte per weight, quantized block by block.

A value is stored as one of 256 levels, to be multiplied by the largest magnitude in its block of
256 values; the levels are denser near 0 (Dettmers 2021, arXiv 2110.02861, sections 2.1 and 2.2).
Levels, block size and the smallest quantized tensor are those of torchao's and bitsandbytes' 8-bit
AdamW. One difference: a positive running square is never rounded to 0, since a weight whose
gradients are a thousandth of the largest in its block would then step by hundreds of learning
rates. torchao itself is not called: if it is installed, transformers imports all of it in every
process.
"""

from functools import cache

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from agcl.modulation.rounding import block_rows

BLOCK = 256
_SMALLEST = 4096
"""Weights of a tensor below which its means stay in float32."""


@cache
def levels(signed: bool, device: torch.device | str = "cpu") -> Tensor:
    """The 256 levels, ascending, float32: from -1 to 1 if `signed`, otherwise from 0 to 1.

    In each decade (the lowest ends at 1e-6, the highest at 1) the levels are evenly spaced, and
    there are twice as many as in the decade below.
    """
    found = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent * (1 if signed else 2) + 1)
        positive = 10.0 ** (exponent - 6) * (edges[:-1] + edges[1:]) / 2
        found += positive.tolist() + ((-positive).tolist() if signed else [])
    return torch.tensor(sorted(found), device=device)


def fits(parameter: Tensor) -> bool:
    """Whether blocks divide the tensor, and every piece that is stepped at a time."""
    if not parameter.is_contiguous() or isinstance(parameter, DTensor):
        return False
    rows, entries = block_rows(parameter.shape), parameter.numel()
    piece = rows * parameter.shape[1:].numel() if parameter.dim() else 1
    whole = entries % BLOCK == 0 and (entries <= piece or piece % BLOCK == 0)
    return entries >= _SMALLEST and whole


def zeros(parameter: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, shaped like the tensor, and the blocks' magnitudes (entries / 256,), of zeros."""
    codes = torch.zeros_like(parameter, dtype=torch.uint8)
    return codes, torch.zeros(parameter.numel() // BLOCK, device=parameter.device)


def read(codes: Tensor, magnitudes: Tensor, *, signed: bool) -> Tensor:
    """The values, float32, shaped like `codes`."""
    values = levels(signed, codes.device)[codes.int()]
    return values.view(-1, BLOCK).mul_(magnitudes.view(-1, 1)).view(codes.shape)


def write(values: Tensor, codes: Tensor, magnitudes: Tensor, *, signed: bool) -> None:
    """Quantize float32 `values` into `codes` and `magnitudes`, in place."""
    blocks = values.view(-1, BLOCK)
    largest = blocks.abs().amax(1).clip_(1e-12)
    numbers = levels(signed, values.device)
    middles = (numbers[1:] + numbers[:-1]) / 2
    nearest = torch.bucketize(blocks / largest.view(-1, 1), middles, out_int32=True, right=True)
    if not signed:
        nearest.clamp_(min=1).mul_(blocks > 0)
    codes.copy_(nearest.view(codes.shape))
    magnitudes.copy_(largest)
