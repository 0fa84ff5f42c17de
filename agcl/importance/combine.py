"""Scaling an importance, the overlap of several tasks' importances, and summaries."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from agcl.importance.importance import Importance
from agcl.importance.moment import summed

_MEASURED_WITH = ("estimator", "unit_inputs")
"""Keys of the header that `check_file` can compare with a config."""


def scaled(entries: Tensor, log_scale: float) -> Tensor:
    """s = log(1 + κ R⁺ / max R) / log(1 + κ), in [0, 1], float32; κ is `log_scale`.

    Negative relevance counts as 0 (the paper's [·]₊). All zeros if no entry is positive.
    """
    positive = entries.float().clamp(min=0)
    largest = positive.max()
    if largest == 0:
        return positive
    return torch.log1p(positive / largest * log_scale) / torch.log1p(
        torch.tensor(log_scale, device=entries.device)
    )


def running_sum(
    importances: Sequence[Importance], *, keep: float, device: torch.device | str = "cpu"
) -> Importance:
    """Sum the moments of several tasks into one importance without entries.

    Each sum is cut to the share `keep`, as in `attribute`. The header keeps `estimator` and
    `unit_inputs` if they are equal for all tasks. Computed on `device`, returned on the CPU. Raises
    `ValueError` without importances, or if one has no moments.
    """
    if not importances or not all(i.moments for i in importances):
        raise ValueError("nothing to sum: an importance has no input moments")
    first = importances[0]
    by_input = {first.input_of(name): name for name in reversed(first.weights)}
    moments = {
        key: summed([i.moments[i.input_of(name)].to(device) for i in importances], keep=keep).to(
            "cpu"
        )
        for key, name in reversed(by_input.items())
    }
    kept = min(moment.kept for moment in moments.values())
    header = {
        **{k: first.header[k] for k in _MEASURED_WITH if _all_equal(k, importances)},
        "tasks": sum(i.header.get("tasks", 1) for i in importances),
        "kept": round(kept, 3),
    }
    return Importance({}, moments, header, first.inputs)


def _all_equal(key: str, importances: Sequence[Importance]) -> bool:
    """Whether all headers have the key, with one value."""
    headers = [importance.header for importance in importances]
    return all(key in h and h[key] == headers[0][key] for h in headers)


def overlap(importances: Sequence[Importance], share: float = 0.01) -> list[list[float]]:
    """For each pair of tasks, the fraction of their top entries that both have in common.

    Top entries are the largest `share` of each weight tensor. 1 on the diagonal; about `share` for
    unrelated tasks. Ignores tensors that are zero in a task, which have no top entries.
    """
    num_tasks = len(importances)
    common = torch.zeros(num_tasks, num_tasks, dtype=torch.float64)
    total = 0
    for name, first in importances[0].entries.items():
        count = max(1, round(share * first.numel()))
        is_top = torch.zeros(num_tasks, first.numel(), dtype=torch.bool)
        for row, importance in zip(is_top, importances, strict=True):
            entries = importance.entries[name].flatten().float()
            if not entries.any():
                break
            row[entries.topk(count).indices] = True
        else:
            total += count
            for task in range(num_tasks):
                common[task] += (is_top[task] & is_top).sum(1)
    return (common / total if total else torch.eye(num_tasks)).tolist()


def by_layer_and_module(importance: Importance) -> dict[str, list[float]]:
    """Sum of a weight tensor's positive relevance, as one list per kind of module.

    Keys are module names within a layer (`self_attn.q_proj`); values are in layer order.
    """
    table: dict[str, list[float]] = {}
    for name in sorted(importance.entries, key=_layer):  # A file has layer 10 before layer 2.
        kind = re.sub(r"^.*\.\d+\.|\.weight$", "", name)
        relevance = importance.entries[name].float().clamp(min=0).sum().item()
        table.setdefault(kind, []).append(relevance)
    return table


def _layer(name: str) -> int:
    number = re.search(r"\.(\d+)\.", name)
    return int(number[1]) if number else 0
