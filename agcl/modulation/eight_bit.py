"""Adam's running means in one byte per weight, quantized block by block.

A value is the largest magnitude of its block of 256 times one of 256 numbers, which lie the closer
the nearer they are to 0 (Dettmers 2021, arXiv 2110.02861, sections 2.1 and 2.2). Numbers, blocks
and the smallest tensor are those of torchao's and bitsandbytes' 8-bit AdamW, with one difference: a
running square is never rounded to 0, which would make a weight step by hundreds of learning rates
where its gradients are a thousandth of its block's largest. torchao's functions are not called:
with the package installed, transformers imports all of it in every process.
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
    """The 256 numbers, ascending, of values from -1 to 1 or from 0 to 1; float32.

    Per power of ten from 1e-6 to 1, twice as many as for the one below, evenly spaced.
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
