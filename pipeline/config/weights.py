"""The dtypes of a model's weights: in its files, and in memory."""

import json

import torch
from agcl.model import models

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
