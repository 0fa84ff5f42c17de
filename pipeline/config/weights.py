"""The dtypes of a model's weights: in its files, and in memory."""

import json

import torch
from agcl.model import models

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
    """The name of the dtype of weights that are attributed: of bfloat16 ones a float32 copy.

    Unless attribution may round too: then it takes the weights as they are.
    """
    half = importance.precision == "bfloat16" and loaded_dtype(model) == "bfloat16"
    return "bfloat16" if half else "float32"
