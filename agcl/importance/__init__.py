"""Importance of weights: the artifact, scaling and overlap, and controls."""

from agcl.importance.combine import by_layer_and_module, overlap, scaled
from agcl.importance.controls import magnitude, permuted, random
from agcl.importance.importance import Importance, check_file

__all__ = [
    "Importance",
    "by_layer_and_module",
    "check_file",
    "magnitude",
    "overlap",
    "permuted",
    "random",
    "scaled",
]
