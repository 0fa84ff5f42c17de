"""Relevances of a batch into the running top-K on the CPU, compiled by numba.

They are made and inserted a few rows at a time and never leave the cache. This runs on the threads
of torch's own operations: between two of them those spin for some milliseconds to be at hand, so
that other threads, numba's own or Python's, would share the cores with them.
"""

import ctypes
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic
from torch import Tensor
from torch.nn.functional import pad

_ROWS, _SAMPLES, _TOKENS = 2, 4, 8
"""What passes the loops below at a time; they are written out for these numbers."""
_BLOCK = 576
"""Input features at a time: 18 KB of products and 18 KB of inputs."""
_JOB = 9
"""Numbers of a job: four addresses and five sizes."""
_MATH = {"contract", "nsz"}
_compiled = njit(cache=True, nogil=True, fastmath=_MATH)
_inlined = njit(cache=True, nogil=True, fastmath=_MATH, inline="always")


def sink_products(values: Tensor, weight: Tensor, x: Tensor, g: Tensor) -> None:
    """Insert W ⊙ (gᵀx) of every sample into descending running values, in place.

    values (K, out, in), weight (out, in), x (samples, tokens, in), g (samples, tokens, out), all of
    them finite float32 on the CPU, values and weight contiguous. As many threads as torch has share
    the output rows.
    """
    samples, tokens = -len(x) % _SAMPLES, -x.shape[1] % _TOKENS
    if samples or tokens:
        x = pad(x, (0, 0, 0, tokens, 0, samples))
        g = pad(pad(g, (0, 0, 0, tokens)), (0, 0, 0, 0, 0, samples), value=torch.nan)
    # Nothing is greater for being compared with NaN: the padded samples enter nowhere.
    x, g = x.contiguous(), g.contiguous()
    addresses = [tensor.data_ptr() for tensor in (values, weight, x, g)]
    _team()(np.array([*addresses, *values.shape, *x.shape[:2]]), torch.get_num_threads())


@cache
def _team() -> Callable[[Any, int], None]:
    """What runs a job: all threads of torch's OpenMP, or this one alone where that is not GNU's."""
    library = next((Path(torch.__file__).parent / "lib").glob("libgomp*"), None)
    if library is None:
        return lambda job, threads: _share(job, 0, 1)
    gomp = ctypes.CDLL(str(library), mode=os.RTLD_NOLOAD)
    index, number = gomp.omp_get_thread_num, gomp.omp_get_num_threads
    parallel = gomp.GOMP_parallel  # What compilers make of `#pragma omp parallel`.
    index.argtypes = number.argtypes = []
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None

    @cfunc(types.void(types.CPointer(types.int64)))  # type: ignore[untyped-decorator]
    def run(job: Any) -> None:
        _share(carray(job, _JOB), index(), number())

    return lambda job, threads: parallel(run.address, job.ctypes.data, threads, 0)


@intrinsic  # type: ignore[untyped-decorator]
def _floats_at(context: Any, address: Any) -> Any:
    """A pointer to the float32 numbers at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.float32)(types.int64), generate


@_compiled  # type: ignore[untyped-decorator]
def _share(job: Any, part: int, parts: int) -> None:
    """One of equal parts of a job's output rows."""
    kept, rows, width, samples, tokens = job[4], job[5], job[6], job[7], job[8]
    values = carray(_floats_at(job[0]), (kept, rows, width))
    weight = carray(_floats_at(job[1]), (rows, width))
    x = carray(_floats_at(job[2]), (samples, tokens, width))
    g = carray(_floats_at(job[3]), (samples, tokens, rows))
    made = np.empty((_ROWS, _SAMPLES, _BLOCK), np.float32)
    start, end = rows * part // parts, rows * (part + 1) // parts
    for left in range(0, width, _BLOCK):
        right = min(left + _BLOCK, width)
        for row in range(start, end, _ROWS):
            other = min(row + 1, end - 1)
            for sample in range(0, samples, _SAMPLES):
                for i in range(_SAMPLES):
                    _multiply(made[0, i], made[1, i], x, g, sample + i, row, other, left, right)
                _insert(values, weight, made[0], row, left, right)
                if other > row:
                    _insert(values, weight, made[1], other, left, right)


@_compiled  # type: ignore[untyped-decorator]
def _multiply(
    p: Any, q: Any, x: Any, g: Any, sample: int, row: int, other: int, left: int, right: int
) -> None:
    """Two rows of a sample's gᵀx, into p and q, eight tokens at a time."""
    p, q = p[: right - left], q[: right - left]
    p[:] = 0
    q[:] = 0
    for t in range(0, x.shape[1], 8):
        # Only rows indexed out of the whole are known to be contiguous, and make fast loops.
        x0, x1 = x[sample, t, left:right], x[sample, t + 1, left:right]
        x2, x3 = x[sample, t + 2, left:right], x[sample, t + 3, left:right]
        x4, x5 = x[sample, t + 4, left:right], x[sample, t + 5, left:right]
        x6, x7 = x[sample, t + 6, left:right], x[sample, t + 7, left:right]
        a, b = g[sample, t : t + 8, row], g[sample, t : t + 8, other]
        a0, a1, a2, a3, a4, a5, a6, a7 = a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]
        b0, b1, b2, b3, b4, b5, b6, b7 = b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]
        for j in range(len(p)):
            first = a0 * x0[j] + a1 * x1[j] + a2 * x2[j] + a3 * x3[j]
            p[j] += first + a4 * x4[j] + a5 * x5[j] + a6 * x6[j] + a7 * x7[j]
            first = b0 * x0[j] + b1 * x1[j] + b2 * x2[j] + b3 * x3[j]
            q[j] += first + b4 * x4[j] + b5 * x5[j] + b6 * x6[j] + b7 * x7[j]


@_compiled  # type: ignore[untyped-decorator]
def _insert(values: Any, weight: Any, made: Any, row: int, left: int, right: int) -> None:
    """Four samples' products of a row, times the weight, through all slots."""
    scale = weight[row, left:right]
    width = len(scale)
    a, b, c, d = made[0, :width], made[1, :width], made[2, :width], made[3, :width]
    for j in range(width):
        a[j] *= scale[j]
        b[j] *= scale[j]
        c[j] *= scale[j]
        d[j] *= scale[j]
    slot = 0
    while slot + 4 <= len(values):
        s, t = values[slot, row, left:right], values[slot + 1, row, left:right]
        u, v = values[slot + 2, row, left:right], values[slot + 3, row, left:right]
        _four(s, t, u, v, a, b, c, d)
        slot += 4
    while slot < len(values):
        _one(values[slot, row, left:right], a, b, c, d)
        slot += 1


@_compiled  # type: ignore[untyped-decorator]
def _four(s: Any, t: Any, u: Any, v: Any, a: Any, b: Any, c: Any, d: Any) -> None:
    """Four samples a to d through four slots s to v; what falls out is left in the samples."""
    for j in range(len(s)):
        slots = s[j], t[j], u[j], v[j]
        slots, a[j] = _through(slots, a[j])
        slots, b[j] = _through(slots, b[j])
        slots, c[j] = _through(slots, c[j])
        slots, d[j] = _through(slots, d[j])
        s[j], t[j], u[j], v[j] = slots


@_compiled  # type: ignore[untyped-decorator]
def _one(s: Any, a: Any, b: Any, c: Any, d: Any) -> None:
    """Four samples through one slot."""
    for j in range(len(s)):
        slot = s[j]
        slot, a[j] = _kept_and_rest(slot, a[j])
        slot, b[j] = _kept_and_rest(slot, b[j])
        slot, c[j] = _kept_and_rest(slot, c[j])
        slot, d[j] = _kept_and_rest(slot, d[j])
        s[j] = slot


@_inlined  # type: ignore[untyped-decorator]
def _through(slots: Any, new: Any) -> Any:
    s, t, u, v = slots
    s, new = _kept_and_rest(s, new)
    t, new = _kept_and_rest(t, new)
    u, new = _kept_and_rest(u, new)
    v, new = _kept_and_rest(v, new)
    return (s, t, u, v), new


@_inlined  # type: ignore[untyped-decorator]
def _kept_and_rest(slot: Any, new: Any) -> Any:
    return (new, slot) if new > slot else (slot, new)
