"""The running top-K on a GPU: one Triton kernel that never writes a sample's products to memory."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _COLUMNS, _TOKENS, _WARPS = 16, 64, 16, 8
"""A tile of the weight, the tokens that are multiplied at a time, and who shares the work: the
largest tried for which eight kept values stay in registers (compute capability 8.0 and 9.0)."""


def insert_products(values: Tensor, weight: Tensor, x: Tensor, g: Tensor) -> None:
    """Insert W ⊙ (gᵀx) of every sample into descending running values, in place.

    values (K, out, in) with K small (see `top_k`), weight (out, in), x (samples, tokens, in),
    g (samples, tokens, out), all float32 on one GPU but for `values`, contiguous, which may be
    bfloat16. A tile of the weight and of its running values is read once, passes all samples in
    registers, and is written once.
    """
    rows, columns = weight.shape
    grid = (triton.cdiv(rows, _ROWS), triton.cdiv(columns, _COLUMNS))
    samples, tokens, _ = x.shape
    sizes = rows, columns, samples, tokens
    strides = values.stride(0), *weight.stride(), *x.stride(), *g.stride()
    constants = len(values), _ROWS, _COLUMNS, _TOKENS
    with torch.cuda.device_of(values):
        _insert[grid](values, weight, x, g, *sizes, *strides, *constants, num_warps=_WARPS)


# Batches differ in both: else it would be compiled up to nine times in the middle of the work.
@triton.jit(do_not_specialize=["samples", "tokens"])  # type: ignore[untyped-decorator]
def _insert(  # type: ignore[no-untyped-def]
    values,
    weight,
    x,
    g,
    rows,
    columns,
    samples,
    tokens,
    next_slot,
    weight_row,
    weight_column,
    x_sample,
    x_token,
    x_column,
    g_sample,
    g_token,
    g_row,
    num_kept: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
    tile_tokens: tl.constexpr,
) -> None:
    row = tl.program_id(0) * tile_rows + tl.arange(0, tile_rows)
    column = tl.program_id(1) * tile_columns + tl.arange(0, tile_columns)
    token = tl.arange(0, tile_tokens)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = values + row.to(tl.int64)[:, None] * columns + column[None, :]
    w = tl.load(
        weight + row.to(tl.int64)[:, None] * weight_row + column[None, :] * weight_column,
        mask=inside,
        other=0.0,
    )
    slots = ()
    place = at
    for _ in tl.static_range(num_kept):
        slot = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        slots += (slot,)  # type: ignore[assignment]
        place += next_slot
    for _ in range(samples):
        new = tl.full((tile_rows, tile_columns), 0.0, tl.float32)
        for first in range(0, tokens, tile_tokens):
            here = first + token
            relevance = tl.load(
                g + here[None, :] * g_token + row[:, None] * g_row,
                mask=(row < rows)[:, None] & (here < tokens)[None, :],
                other=0.0,
            )
            inputs = tl.load(
                x + here[:, None] * x_token + column[None, :] * x_column,
                mask=(here < tokens)[:, None] & (column < columns)[None, :],
                other=0.0,
            )
            # Plain float32: rounded to TF32, values would depend on the kind of GPU.
            new = tl.dot(relevance, inputs, new, input_precision="ieee")
        new *= w
        after = ()
        for k in tl.static_range(num_kept):
            larger = new > slots[k]
            after += (tl.where(larger, new, slots[k]),)  # type: ignore[assignment]
            new = tl.where(larger, slots[k], new)
        slots = after
        x += x_sample
        g += g_sample
    for k in tl.static_range(num_kept):
        tl.store(at, slots[k], mask=inside)
        at += next_slot
