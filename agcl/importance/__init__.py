"""Importance of weights: the artifact, scaling and overlap, and controls."""

from agcl.importance.combine import by_layer_and_module, overlap, running_sum, scaled
from agcl.importance.controls import magnitude, permuted, random
from agcl.importance.importance import Importance, check_file
from agcl.importance.moment import Moment

__all__ = [
    "Importance",
    "Moment",
    "by_layer_and_module",
    "check_file",
    "magnitude",
    "overlap",
    "permuted",
    "random",
    "running_sum",
    "scaled",
]
