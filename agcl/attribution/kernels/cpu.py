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
def _insert(values: Any, weight: Any, x: Any, g: Any) -> None:  # noqa: C901 (calls are slower)
    rows, width = weight.shape
    samples, tokens, _ = x.shape
    # Two rows and four tokens per pass: each load of the inputs serves two rows, and the products
    # are loaded and stored a quarter as often.
    for pair in prange((rows + 1) // 2):
        row = 2 * pair
        other = min(row + 1, rows - 1)  # The last row again if their number is odd.
        product = np.empty((2, width), np.float32)
        p, q = product[0], product[1]
        for s in range(samples):
            product[:] = 0
            for t in range(0, tokens - 3, 4):
                x0, x1, x2, x3 = x[s, t], x[s, t + 1], x[s, t + 2], x[s, t + 3]
                p0, p1, p2, p3 = g[s, t, row], g[s, t + 1, row], g[s, t + 2, row], g[s, t + 3, row]
                q0, q1, q2, q3 = (
                    g[s, t, other],
                    g[s, t + 1, other],
                    g[s, t + 2, other],
                    g[s, t + 3, other],
                )
                for i in range(width):
                    p[i] = p[i] + p0 * x0[i] + p1 * x1[i] + p2 * x2[i] + p3 * x3[i]
                    q[i] = q[i] + q0 * x0[i] + q1 * x1[i] + q2 * x2[i] + q3 * x3[i]
            for t in range(tokens - tokens % 4, tokens):
                for i in range(width):
                    p[i] += g[s, t, row] * x[s, t, i]
                    q[i] += g[s, t, other] * x[s, t, i]
            for r in range(row, other + 1):
                sample = product[r - row]
                for i in range(width):
                    sample[i] *= weight[r, i]
                for k in range(len(values)):
                    for i in range(width):
                        new, old = sample[i], values[k, r, i]
                        larger = new > old  # False for a NaN that is kept, so it stays.
                        values[k, r, i] = new if larger else old
                        sample[i] = old if larger else new
