"""Merge a trained model with the one that it was trained from, or with the base model."""

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from agcl.model import models

from pipeline.stages.context import Context


def merge(
    config: Mapping[str, Any], inputs: Mapping[str, Path], out_dir: Path, context: Context
) -> None:
    """Write the model `onto` + `factor` x (`model` - `onto`), weight by weight.

    Between the base and the fine-tuned model this is WiSE-FT (Wortsman et al. 2022, arXiv
    2109.01903, equation 1). From the previous task's model, with a factor of 1/sqrt(t), it scales
    task t's change as SLAO (2025, arXiv 2512.23017) scales that of its factors.
    """
    model = context.take_model(inputs["model"], config)
    onto = context.loaded(inputs["onto"], config)
    interpolate(dict(model.named_parameters()), dict(onto.named_parameters()), config["factor"])
    models.save(model, models.load_tokenizer(inputs["model"]), out_dir)
    del onto
    if context.shard_model:
        gc.collect()  # Cycles would keep a sharded model in memory while the next task is trained.
    context.hold_model(model, context.folder)


@torch.no_grad()
def interpolate(
    weights: Mapping[str, torch.Tensor], onto: Mapping[str, torch.Tensor], factor: float
) -> None:
    """Move weights in place to `onto` + factor x (weights - `onto`), computed in float32."""
    for name, weight in weights.items():
        start = onto[name].float()
        weight.copy_(torch.lerp(start, weight.float(), factor))  # Exact for a factor of 1.
