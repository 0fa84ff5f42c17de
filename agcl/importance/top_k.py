"""The K largest values per entry of a stream of equally shaped tensors, mergeable."""

import torch
from torch import Tensor


class TopK:
    """Running K largest values of every entry, in descending order.

    A reduction: the state after any sequence of `insert` and `merge` depends only on the multiset
    of inserted tensors, never on their order or grouping, bit for bit.
    """

    def __init__(self, k: int, like: Tensor) -> None:
        self.values = torch.full((k, *like.shape), -torch.inf, dtype=like.dtype, device=like.device)
        """(k, *shape), type of `like`; slots not yet filled hold -inf."""
        self.count = 0

    def insert(self, value: Tensor) -> None:
        """Insert one tensor of the entries' shape. Overwrites `value`."""
        self._sink(value)
        self.count += 1

    def merge(self, values: Tensor, count: int) -> None:
        """Insert another running state, `values` of shape (k, *shape) holding `count` tensors."""
        for value in values[: min(count, len(values))].clone():
            self._sink(value)
        self.count += count

    def mean(self) -> Tensor:
        """Mean of the min(k, count) largest values; zeros where nothing was inserted."""
        filled = self.values[: min(self.count, len(self.values))]
        return filled.mean(0) if len(filled) else torch.zeros_like(self.values[0])

    def _sink(self, value: Tensor) -> None:
        spare = torch.empty_like(value)
        for slot in self.values:
            torch.minimum(slot, value, out=spare)
            torch.maximum(slot, value, out=slot)
            value, spare = spare, value
