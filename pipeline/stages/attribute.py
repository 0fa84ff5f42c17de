"""Attribute: which weights carried the right answers of a task."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from agcl import distributed
from agcl.attribution import attribute as attribute_batches
from agcl.batches import collate, in_order
from agcl.tasks import TRAIN, EncodedRows

from pipeline.stages.context import Context
from pipeline.stages.train import IMPORTANCE_FILE


def attribute(
    config: Mapping[str, Any], inputs: Mapping[str, Path], out_dir: Path, context: Context
) -> None:
    """Write `importance.safetensors` for `model` on the training rows of `rows`."""
    model = context.take_model(inputs["model"])
    rows = EncodedRows(inputs["rows"] / f"{TRAIN}.arrow")
    chosen = _sample(len(rows), config["samples"], config["seed"])
    batches = in_order(len(chosen), config["batch_size"])
    mine = batches[distributed.rank() :: distributed.world_size()]
    importance = attribute_batches(
        model,
        (collate([rows[chosen[i]] for i in indices]) for indices in mine),
        top_k=config["top_k"],
        rules=config["rules"],
        moments=config["moments"],
        correct_only=config["correct_only"],
        log=lambda done: context.log({"rows": done, "of_rows": len(chosen)}, done),
    )
    importance.check_finite()
    if importance.is_zero():
        raise ValueError("every importance is zero: no relevance reached any weight")
    if context.is_first_worker:
        importance.save(out_dir / IMPORTANCE_FILE)
    context.hold_model(model, inputs["model"])


def _sample(num_rows: int, samples: int | None, seed: int) -> list[int]:
    if samples is None or samples >= num_rows:
        return list(range(num_rows))
    generator = torch.Generator().manual_seed(seed)
    return sorted(torch.randperm(num_rows, generator=generator)[:samples].tolist())
