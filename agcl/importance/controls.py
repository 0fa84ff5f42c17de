"""Control importances that ignore the data: baselines that a real estimator has to beat."""

from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from agcl.importance.importance import Importance
from agcl.parallel import sharding


def magnitude(importance: Importance, linears: Mapping[str, nn.Module]) -> Importance:
    """The importance with entries |W| and the same moments."""
    # To main memory, a layer at a time: a device may not hold all of a sharded model.
    entries = {
        name: sharding.whole(cast(Tensor, layer.weight).detach()).abs().cpu()
        for name, layer in linears.items()
    }
    header = {**importance.header, "estimator": "magnitude"}
    return replace(importance, entries=entries, header=header)


def random(importance: Importance, *, seed: int) -> Importance:
    """The importance with entries uniform in [0, 1) and the same moments."""
    generator = torch.Generator().manual_seed(seed)
    entries = {n: torch.rand(e.shape, generator=generator) for n, e in importance.entries.items()}
    return replace(importance, entries=entries, header={**importance.header, "estimator": "random"})


def permuted(importance: Importance, *, seed: int) -> Importance:
    """The importance with entries shuffled within each tensor and the same moments."""
    generator = torch.Generator().manual_seed(seed)

    def shuffle(entries: Tensor) -> Tensor:
        order = torch.randperm(entries.numel(), generator=generator).to(entries.device)
        return entries.flatten()[order].view_as(entries)

    entries = {name: shuffle(entries) for name, entries in importance.entries.items()}
    return replace(importance, entries=entries, header={**importance.header, "permuted": True})
