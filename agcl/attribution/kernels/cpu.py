"""Relevances of a batch into the running top-K on the CPU, compiled by numba.

As in a matrix product (Goto and van de Geijn 2008) a tile of them is made in registers, of inputs
and gradients that lie in the order of their use. From there it goes on through the running values,
and is never in memory. This runs on the threads of torch's own operations: between two of them
those spin for some milliseconds to be at hand, so that other threads, numba's own or Python's,
would share the cores with them.
"""

import ctypes
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numba import carray, cfunc, types
from torch import Tensor

from agcl.attribution.kernels.cpu_tile import COLUMNS, JOB, ROWS, sink_share


def sink_products(values: Tensor, weight: Tensor, x: Tensor, g: Tensor) -> None:
    """Insert W ⊙ (gᵀx) of every sample into descending running values, in place.

    values (K, out, in), float32 or bfloat16, weight (out, in), x (samples, tokens, in), g (samples,
    tokens, out), finite float32; all on the CPU, values and weight contiguous. As many threads as
    torch has share the output rows.
    """
    x, g = x.contiguous(), g.contiguous()
    tiles = _in_tiles(x, COLUMNS), _in_tiles(g, ROWS)
    sizes = *values.shape, *x.shape[:2], values.dtype == torch.bfloat16
    addresses = [tensor.data_ptr() for tensor in (values, weight, x, g, *tiles)]
    _team()(np.array([*sizes, *addresses], np.int64), torch.get_num_threads())


def _in_tiles(tensor: Tensor, size: int) -> Tensor:
    """Every whole group of `size` features by itself: (groups, tokens of all samples, size)."""
    groups = tensor.shape[-1] // size
    whole = tensor.flatten(0, 1)[:, : groups * size]
    return whole.reshape(len(whole), groups, size).transpose(0, 1).contiguous()


@cache
def _team() -> Callable[[Any, int], None]:
    """What runs a job: all threads of torch's OpenMP, or this one alone where that is not GNU's."""
    library = next((Path(torch.__file__).parent / "lib").glob("libgomp*"), None)
    if library is None:
        return lambda job, threads: sink_share(job, 0, 1)
    gomp = ctypes.CDLL(str(library), mode=os.RTLD_NOLOAD)
    index, number = gomp.omp_get_thread_num, gomp.omp_get_num_threads
    parallel = gomp.GOMP_parallel  # What compilers make of `#pragma omp parallel`.
    index.argtypes = number.argtypes = []
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None

    @cfunc(types.void(types.CPointer(types.int64)))  # type: ignore[untyped-decorator]
    def run(job: Any) -> None:
        sink_share(carray(job, len(JOB)), index(), number())

    return lambda job, threads: parallel(run.address, job.ctypes.data, threads, 0)
