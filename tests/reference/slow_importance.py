"""Importance and input moments from the explicit LRP, by loops over rows and tokens."""

from collections.abc import Sequence
from typing import Any

import torch
from reference.explicit_lrp import explain
from torch import Tensor

READERS = {"q_proj": ("q_proj", "k_proj", "v_proj"), "gate_proj": ("gate_proj", "up_proj")}
"""Layers that read one input; the others have one each."""


def importance(
    model: Any, rows: Sequence[Any], *, top_k: int | None, rules: str = "attnlrp"
) -> dict[str, Tensor]:
    """Mean of each entry's `top_k` largest per-row relevances, each row divided by its flow."""
    stacks: dict[str, list[Tensor]] = {}
    for row in rows:
        explanation = explain(model, row, rules)
        for name, relevance in explanation.weights.items():
            flow = explanation.outputs[name].abs().sum()
            stacks.setdefault(name, []).append(relevance / flow if flow else relevance)
    stacks.pop("lm_head.weight")
    k = min(top_k or len(rows), len(rows))
    return {name: torch.stack(s).topk(k, dim=0).values.mean(0) for name, s in stacks.items()}


def second_moments(
    model: Any,
    rows: Sequence[Any],
    *,
    weighting: str,
    rules: str = "attnlrp",
    unit_inputs: bool = True,
) -> dict[str, Tensor]:
    """Σ r x xᵀ over all but each row's last token, r scaled to mean 1, x optionally to length 1.

    Keyed by the first weight that reads an input; r is what arrives through all that do.
    """
    explanations = [explain(model, row, rules) for row in rows]
    result = {}
    for name, inputs in explanations[0].inputs.items():
        kind = name.split(".")[-2]
        readers = READERS.get(kind, (kind,))
        if name == "lm_head.weight" or any(kind in later[1:] for later in READERS.values()):
            continue
        vectors, shares = [], []
        for row, explanation in zip(rows, explanations, strict=True):
            first = row.prompt_tokens - 1 if weighting == "answer" else 0
            parts = [explanation.outputs[name.replace(kind, reader)] for reader in readers]
            arriving = sum(part.sum(1) for part in parts).abs()
            vectors += list(explanation.inputs[name][first:-1])
            shares += arriving[first:-1].tolist()
        if weighting != "relevance" or not any(shares):
            shares = [1.0] * len(vectors)
        mean = sum(shares) / len(shares)
        result[name] = torch.zeros(inputs.shape[1], inputs.shape[1], dtype=torch.float64)
        for x, r in zip(vectors, shares, strict=True):
            direction = x / x.norm() if unit_inputs and x.any() else x
            result[name] += r / mean * torch.outer(direction, direction)
    return result
