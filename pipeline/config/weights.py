"""The dtypes of a model's weights in its files and in memory, and what a machine is slow with."""

import json

import torch
from agcl.model import models
from agcl.model.forward import cpu_has_bfloat16

from pipeline.config.config import Config
from pipeline.config.method import Importance
from pipeline.config.model import Model


def stored_dtype(model: Model) -> torch.dtype:
    """The dtype of the weights in the model's files, in which the final model is saved too."""
    if model.is_builtin:
        return torch.float32
    return models.stored_dtype(
        json.loads((model.folder / "config.json").read_text(encoding="utf-8"))
    )


def loaded_dtype(model: Model) -> str:
    """The name of the dtype of the weights in memory: of the files' for `auto`."""
    return str(stored_dtype(model)).removeprefix("torch.") if model.dtype == "auto" else model.dtype


def attributed_dtype(model: Model, importance: Importance) -> str:
    """Name of the dtype in which weights are attributed: float32, with a copy of bfloat16 weights.

    If `importance.precision` is bfloat16 too, bfloat16 weights are used without a copy.
    """
    half = importance.precision == "bfloat16" and loaded_dtype(model) == "bfloat16"
    return "bfloat16" if half else "float32"


def rounds_to_nearest(config: Config) -> bool:
    """Whether weights are trained in bfloat16 as torch does it, Adam's means included."""
    half = loaded_dtype(config.model) == "bfloat16"
    return half and not config.trains_factors and config.training.rounding == "nearest"


def rounds_8bit_to_nearest(config: Config, dtype: str) -> bool:
    """Whether 8-bit Adam would round weights of this dtype to nearest, which it cannot."""
    training = config.training
    to_nearest = dtype == "bfloat16" and training.rounding == "nearest"
    return to_nearest and training.optimizer == "adamw_8bit" and not config.trains_factors


def slow_here(config: Config) -> str | None:
    """A warning with the settings to change if a run would be needlessly slow here, else None.

    That is, if the run leaves a GPU unused, or uses bfloat16 on a CPU without bfloat16
    instructions, where PyTorch falls back to matrix products without a library.
    """
    if config.resources.gpus_per_worker:
        return None
    if torch.cuda.is_available():
        return "resources.gpus_per_worker is 0, so this machine's GPU is not used: set it to 1"
    if cpu_has_bfloat16():
        return None
    used = {
        "model.dtype": loaded_dtype(config.model),
        "training.precision": config.training.precision,
        "evaluation.precision": config.evaluation.precision,
        "importance.precision": config.importance.precision,
    }
    settings = [f"{key}=float32" for key, dtype in used.items() if dtype == "bfloat16"]
    if not settings:
        return None
    return (
        "this CPU has no bfloat16 instructions, and steps in bfloat16 can take over ten times as "
        f"long as in float32: set {' '.join(settings)}"
    )
