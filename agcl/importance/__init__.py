"""Importance of weights: the artifact, combining several tasks, and controls."""

from agcl.importance.combine import by_layer_and_module, overlap, past_maximum, scaled
from agcl.importance.controls import magnitude, permuted, random
from agcl.importance.importance import Importance, check_file

__all__ = [
    "Importance",
    "by_layer_and_module",
    "check_file",
    "magnitude",
    "overlap",
    "past_maximum",
    "permuted",
    "random",
    "scaled",
]
