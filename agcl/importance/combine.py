"""Importances of several tasks together: scaling, maximum over tasks, overlap, summaries."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from agcl.importance.importance import Importance


def scaled(entries: Tensor, log_scale: float) -> Tensor:
    """s = log(1 + κ R⁺ / max R) / log(1 + κ), in [0, 1], float32; κ is `log_scale`.

    Negative relevance counts as 0 (the paper's [·]₊). All zeros where no entry is positive.
    """
    positive = entries.float().clamp(min=0)
    largest = positive.max()
    if largest == 0:
        return positive
    return torch.log1p(positive / largest * log_scale) / torch.log1p(
        torch.tensor(log_scale, device=entries.device)
    )


def past_maximum(past: Sequence[Importance], name: str, log_scale: float) -> Tensor:
    """Entry-wise maximum over past tasks of the scaled importance of one weight."""
    maximum = scaled(past[0].entries[name], log_scale)
    for importance in past[1:]:
        torch.maximum(maximum, scaled(importance.entries[name], log_scale), out=maximum)
    return maximum


def overlap(importances: Sequence[Importance], share: float = 0.01) -> list[list[float]]:
    """Per pair of tasks, the share of their top entries (per weight) that they have in common.

    1 on the diagonal; `share` for two unrelated tasks.
    """
    num_tasks = len(importances)
    common = torch.zeros(num_tasks, num_tasks, dtype=torch.float64)
    total = 0
    for name, first in importances[0].entries.items():
        keep = max(1, round(share * first.numel()))
        total += keep
        top = [i.entries[name].flatten().float().topk(keep).indices for i in importances]
        chosen = torch.zeros(num_tasks, first.numel(), dtype=torch.bool)
        for row, indices in zip(chosen, top, strict=True):
            row[indices] = True
        for a in range(num_tasks):
            common[a] += (chosen[a] & chosen).sum(1)
    return (common / total).tolist()


def by_layer_and_module(importance: Importance) -> dict[str, list[float]]:
    """Mean positive relevance of a weight entry, times its tensor's size: one list a module kind.

    Keys are module names inside a layer (`self_attn.q_proj`), values are ordered by layer.
    """
    table: dict[str, list[float]] = {}
    for name, entries in importance.entries.items():
        kind = re.sub(r"^.*\.\d+\.|\.weight$", "", name)
        table.setdefault(kind, []).append(entries.float().clamp(min=0).sum().item())
    return table
