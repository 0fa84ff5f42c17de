"""The inner loop of the running top-K on the CPU, compiled by numba.

Its threads are plain ones that wait for work: numba's own would change the number of torch's
OpenMP threads behind its back, which made every later operation many times slower.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import pairwise
from typing import Any

import torch
from numba import njit
from torch import Tensor


def sink_products(values: Tensor, weight: Tensor, products: Tensor, first: int) -> None:
    """Multiply products by the weight and insert them into descending running values, in place.

    values (K, out, in), weight (out, in), products (samples, rows, in): of the output rows from
    `first` on; overwritten. A row's values stay in the cache while all samples pass. All are
    float32 on the CPU; as many threads as torch has share the rows.
    """
    rows, threads = products.shape[1], torch.get_num_threads()
    run = partial(_sink, values.numpy(), weight.numpy(), products.numpy(), first)
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


@njit(cache=True, nogil=True, fastmath={"contract", "nsz"})  # type: ignore[untyped-decorator]
def _sink(values: Any, weight: Any, products: Any, first: int, start: int, end: int) -> None:
    num_kept, _, width = values.shape
    for row in range(start, end):
        weights = weight[first + row]
        for sample in range(products.shape[0]):
            value = products[sample, row]
            for j in range(width):
                value[j] *= weights[j]
            for k in range(num_kept):
                slot = values[k, first + row]
                for j in range(width):
                    new, old = value[j], slot[j]
                    slot[j] = new if new > old else old
                    value[j] = old if new > old else new
