"""The inner loop of the running top-K on the CPU, compiled by numba."""

from typing import Any

from numba import njit, prange


@njit(parallel=True, cache=True, nogil=True, fastmath={"contract", "nsz"})  # type: ignore[untyped-decorator]
def sink_products(values: Any, weight: Any, products: Any, first: int) -> None:
    """Multiply products by the weight and insert them into descending running values, in place.

    values (K, out, in), weight (out, in), products (samples, rows, in): of the output rows from
    `first` on; overwritten. A row's values stay in the cache while all samples pass.
    """
    num_kept, _, width = values.shape
    for row in prange(products.shape[1]):
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
