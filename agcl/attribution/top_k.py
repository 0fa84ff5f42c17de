"""The K largest values per entry of a stream of equally shaped tensors, mergeable."""

from importlib.util import find_spec

import torch
from torch import Tensor

_TILE_ENTRIES, _TILES_ON_GPU = 2**20, 64
"""Products held in memory at a time if no kernel applies: 4 MB in float32, which fits a CPU's
cache. On a GPU, where every tile takes several kernel launches, `_TILES_ON_GPU` times as many."""
_MAX_K_ON_GPU = 8
"""Running values that fit into a GPU's registers beside a tile of products."""


class TopK:
    """Running K largest values of every entry, in descending order.

    A reduction: the state after any sequence of insertions and merges depends only on the multiset
    of inserted tensors, never on their order or grouping, bit for bit. That holds in bfloat16 too,
    since rounding keeps the order: what is kept are the rounded K largest.
    """

    def __init__(self, k: int, like: Tensor, dtype: torch.dtype | None = None) -> None:
        """`dtype` is what values are kept in, that of `like` (which is computed in) by default."""
        shape, self.computed_in = (k, *like.shape), like.dtype
        self.values = torch.full(shape, -torch.inf, dtype=dtype or like.dtype, device=like.device)
        """(k, *shape); slots not yet filled hold -inf."""
        self.count = 0

    def insert_products(self, weight: Tensor, x: Tensor, g: Tensor) -> None:
        """Insert W ⊙ (gᵀx) of every sample, without holding more than some rows of them.

        weight (out, in), x (samples, tokens, in), g (samples, tokens, out); all finite.
        """
        samples, _, width = x.shape
        x, g = x.to(self.computed_in), g.to(self.computed_in)
        self.count += samples
        if _fits_the_gpu_kernel(self.values, weight):
            from agcl.attribution.kernels import gpu

            gpu.insert_products(self.values, weight, x, g)
            return
        compiled = self._fits_the_cpu_kernel(weight)
        tile = _TILE_ENTRIES * (_TILES_ON_GPU if weight.is_cuda else 1)
        rows = max(1, tile // (max(1, samples) * width))
        if compiled and self.values.dtype == self.computed_in:
            rows = len(weight)  # Needs no copies.
        for first in range(0, len(weight), rows):
            part = slice(first, first + rows)
            kept = self.values[:, part]
            # bfloat16 is widened and rounded again, some rows at a time.
            wide = kept.to(self.computed_in, memory_format=torch.contiguous_format)
            if compiled:
                from agcl.attribution.kernels import cpu  # Numba takes a second to load.

                cpu.insert_products(wide, weight[part], x, g[:, :, part])
            else:
                _insert_all(wide, torch.bmm(g[:, :, part].transpose(1, 2), x).mul_(weight[part]))
            if wide is not kept:
                kept.copy_(wide)

    def merge(self, values: Tensor, count: int) -> None:
        """Insert another running state, `values` of shape (k, *shape) holding `count` tensors."""
        _insert_all(self.values, values[: min(count, len(values))].clone())
        self.count += count

    def mean(self) -> Tensor:
        """Mean of the min(k, count) largest values; zeros where nothing was inserted."""
        filled = self.values[: min(self.count, len(self.values))].to(self.computed_in)
        zeros = torch.zeros(self.values.shape[1:], dtype=self.computed_in, device=filled.device)
        return filled.mean(0) if len(filled) else zeros

    def _fits_the_cpu_kernel(self, weight: Tensor) -> bool:
        return (
            self.values.device.type == "cpu" and self.computed_in == weight.dtype == torch.float32
        )


def _insert_all(slots: Tensor, values: Tensor) -> None:
    """Insert each value into descending slots, (k, *shape). Overwrites `values`."""
    for value in values:
        spare = torch.empty_like(value)
        for slot in slots:
            torch.minimum(slot, value, out=spare)
            torch.maximum(slot, value, out=slot)
            value, spare = spare, value


def _fits_the_gpu_kernel(values: Tensor, weight: Tensor) -> bool:
    return (
        values.device.type == "cuda"
        and weight.dtype == torch.float32
        and len(values) <= _MAX_K_ON_GPU
        and find_spec("triton") is not None  # It comes with torch's CUDA builds.
    )
