"""The inner loop of the running top-K on the CPU, compiled by numba.

Its threads are plain ones that wait for work: numba's own would change the number of torch's
OpenMP threads behind its back, which made every later operation many times slower.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

AT_ONCE = 4
"""Samples that pass a slot together, in registers; the kernels below are written out for four."""
_MATH = {"contract", "nsz"}


def sink_products(values: Tensor, weight: Tensor, products: Tensor, first: int) -> None:
    """Multiply products by the weight and insert them into descending running values, in place.

    values (K, out, in), weight (out, in), products (samples, rows, in): of the output rows from
    `first` on; overwritten. The number of samples is a multiple of `AT_ONCE`; a sample of NaN
    enters nowhere. A row's values stay in the cache while all samples pass. All are contiguous
    float32 on the CPU; as many threads as torch has share the rows.
    """
    rows, threads = products.shape[1], torch.get_num_threads()
    # Not by weight.numpy(), after which a sharded layer's memory could not be freed again.
    run = partial(_sink, values.numpy(), np.from_dlpack(weight), products.numpy(), first)
    if threads == 1:
        run(0, rows)
        return
    ends = [rows * number // threads for number in range(threads + 1)]
    work = [_pool(threads).submit(run, start, end) for start, end in pairwise(ends)]
    for each in work:
        each.result()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


@njit(cache=True, nogil=True, fastmath=_MATH)  # type: ignore[untyped-decorator]
def _sink(values: Any, weight: Any, products: Any, first: int, start: int, end: int) -> None:
    num_kept, _, width = values.shape
    ones = np.ones(width, values.dtype)
    for row in range(start, end):
        # Only rows indexed out of the whole are known to be contiguous, and make fast loops.
        at = first + row
        for i in range(0, len(products), 4):
            a, b = products[i, row], products[i + 1, row]
            c, d = products[i + 2, row], products[i + 3, row]
            scale, k = weight[at], 0
            while k < num_kept:
                if num_kept - k >= 4:
                    s, t = values[k, at], values[k + 1, at]
                    u, v = values[k + 2, at], values[k + 3, at]
                    _four(s, t, u, v, a, b, c, d, scale)
                    k += 4
                else:
                    _one(values[k, at], a, b, c, d, scale)
                    k += 1
                scale = ones


@njit(cache=True, nogil=True, fastmath=_MATH)  # type: ignore[untyped-decorator]
def _four(s: Any, t: Any, u: Any, v: Any, a: Any, b: Any, c: Any, d: Any, scale: Any) -> None:
    """Four samples a to d through four slots s to v; what falls out is left in the samples."""
    for j in range(len(scale)):
        slots = s[j], t[j], u[j], v[j]
        slots, a[j] = _through(slots, a[j] * scale[j])
        slots, b[j] = _through(slots, b[j] * scale[j])
        slots, c[j] = _through(slots, c[j] * scale[j])
        slots, d[j] = _through(slots, d[j] * scale[j])
        s[j], t[j], u[j], v[j] = slots


@njit(cache=True, nogil=True, fastmath=_MATH)  # type: ignore[untyped-decorator]
def _one(s: Any, a: Any, b: Any, c: Any, d: Any, scale: Any) -> None:
    """Four samples through one slot."""
    for j in range(len(scale)):
        slot = s[j]
        slot, a[j] = _kept_and_rest(slot, a[j] * scale[j])
        slot, b[j] = _kept_and_rest(slot, b[j] * scale[j])
        slot, c[j] = _kept_and_rest(slot, c[j] * scale[j])
        slot, d[j] = _kept_and_rest(slot, d[j] * scale[j])
        s[j] = slot


@njit(cache=True, nogil=True, fastmath=_MATH, inline="always")  # type: ignore[untyped-decorator]
def _through(slots: Any, new: Any) -> Any:
    s, t, u, v = slots
    s, new = _kept_and_rest(s, new)
    t, new = _kept_and_rest(t, new)
    u, new = _kept_and_rest(u, new)
    v, new = _kept_and_rest(v, new)
    return (s, t, u, v), new


@njit(cache=True, nogil=True, fastmath=_MATH, inline="always")  # type: ignore[untyped-decorator]
def _kept_and_rest(slot: Any, new: Any) -> Any:
    return (new, slot) if new > slot else (slot, new)
