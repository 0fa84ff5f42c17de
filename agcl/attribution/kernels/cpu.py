"""The running top-K on the CPU: products of a batch and their insertion, compiled by numba."""

import ctypes
from typing import Any

import numba
import numpy as np
import torch
from numba import njit, prange
from torch import Tensor


def insert_products(values: Tensor, weight: Tensor, x: Tensor, g: Tensor) -> None:
    """Insert W ⊙ (gᵀx) of every sample into descending running values, in place.

    values (K, out, in), weight (out, in), x (samples, tokens, in), g (samples, tokens, out): finite
    float32 on the CPU, values contiguous. Uses as many threads as torch does.
    """
    threads = torch.get_num_threads()
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    operands = [operand.contiguous() for operand in (weight, x, g)]
    _insert(_array(values), *map(_array, operands))
    # Numba shares torch's OpenMP, whose number of threads it sets as it starts.
    torch.set_num_threads(threads)


def _array(tensor: Tensor) -> Any:
    """The memory of a contiguous tensor. `Tensor.numpy` would pin it, but FSDP frees weights."""
    pointer = ctypes.cast(tensor.data_ptr(), ctypes.POINTER(ctypes.c_float))
    if not tensor.numel():
        return np.empty(tensor.shape, np.float32)
    return np.ctypeslib.as_array(pointer, tensor.shape)


# `contract` allows fused multiply-adds but no other order of the sum, so a sample's products do not
# depend on the samples beside it.
@njit(parallel=True, cache=True, fastmath={"contract"})  # type: ignore[untyped-decorator]
def _insert(values: Any, weight: Any, x: Any, g: Any) -> None:
    kept, rows, width = values.shape
    samples, tokens, _ = x.shape
    for row in prange(rows):
        product = np.empty(width, np.float32)
        for s in range(samples):
            product[:] = 0
            # Four tokens per pass: a row of products is then loaded and stored a quarter as often.
            for t in range(0, tokens - 3, 4):
                a, b, c, d = g[s, t, row], g[s, t + 1, row], g[s, t + 2, row], g[s, t + 3, row]
                for i in range(width):
                    total = product[i] + a * x[s, t, i] + b * x[s, t + 1, i]
                    product[i] = total + c * x[s, t + 2, i] + d * x[s, t + 3, i]
            for t in range(tokens - tokens % 4, tokens):
                for i in range(width):
                    product[i] += g[s, t, row] * x[s, t, i]
            for i in range(width):
                product[i] *= weight[row, i]
            for k in range(kept):
                for i in range(width):
                    new, old = product[i], values[k, row, i]
                    larger = new > old  # False for a NaN that is kept, so it stays.
                    values[k, row, i] = new if larger else old
                    product[i] = old if larger else new
