"""Memory of decomposed weights, by a formula.

Factors of OSFT (`subspace`), those of the first task, the most, and of CorDA (`adapter.init`);
leading directions that a projection protects (`directions: weights`).
"""

import math

from pipeline.config.method import Project
from pipeline.config.sources import sources
from pipeline.estimate.setting import FLOAT, Part, Parts, Setting, entries

_DOUBLE = 8
"""Bytes of a number in float64, in which directions are computed."""


def trained_factors(setting: Setting) -> int:
    """Numbers in the trained U, S and V of all layers."""
    pairs = zip(setting.shape.linears, _kept(setting), strict=True)
    return sum((min(linear) - rank) * (sum(linear) + 1) for linear, rank in pairs)


def held_factors(setting: Setting) -> list[Part]:
    """Trained factors U, S, V, a copy of their initial values, and frozen directions.

    PEFT stores the frozen directions of a weight's longer side only, and none of a square weight.
    For CorDA: its initial factors.
    """
    if setting.config.starts_from_corda:
        return [Part("factors at the start", FLOAT * entries(setting.factors), on_host=True)]
    if not setting.config.subspace:
        return []
    pairs = zip(setting.shape.linears, _kept(setting), strict=True)
    leading = sum(rank * max(linear) * (linear[0] != linear[1]) for linear, rank in pairs)
    return [Part("factors", FLOAT * (2 * trained_factors(setting) + leading))]


def kept_by_factors(setting: Setting, tokens: int, *, size: int, checkpointing: bool) -> int:
    """Bytes that a forward pass keeps: the factors, new and old side by side, and their products.

    `size` is that of a number. With `checkpointing`, of one layer.
    """
    if not setting.config.subspace:
        return 0
    products = tokens * (sum(map(min, setting.shape.linears)) - sum(_kept(setting)))
    kept = 2 * size * (trained_factors(setting) + products)
    return kept // setting.shape.layers if checkpointing else kept


def decompose_peak(setting: Setting) -> Parts:
    """The end of CorDA's decomposition, when PEFT holds every layer's covariance and its result."""
    linears = setting.shape.linears
    widest = max(width for _, width in linears)
    vectors = sum(min(linear) * sum(linear) for linear in linears)
    return (
        Part("weights", FLOAT * setting.shape.weights),
        Part("covariances", FLOAT * sum(width**2 for _, width in linears)),
        Part("singular vectors", FLOAT * vectors, on_host=True),
        Part("decomposing a weight", 4 * FLOAT * widest**2),
    )


def _kept(setting: Setting) -> list[int]:
    """Singular directions of every layer's weight that the first task keeps."""
    section = setting.config.subspace
    share = section.preserved(1, len(sources(setting.config))) if section else 0.0
    return [max(1, int(min(linear) * share)) for linear in setting.shape.linears]


def projection_of_weights(setting: Setting) -> Project | None:
    """The projection that protects the weights' own directions, if there is one."""
    projections = (item for item in setting.config.protect if isinstance(item, Project))
    return next((item for item in projections if not item.needs_importance), None)


def directions_of_weights(setting: Setting, projection: Project) -> int:
    """Bytes of the protected directions, at most: those of weights with equal singular values."""
    ranks = ((math.ceil(projection.energy * min(each)), each[1]) for each in setting.protected)
    return FLOAT * sum(rank * width for rank, width in ranks)


def decomposing(setting: Setting) -> Part:
    """A weight in float64, its Gram matrix, eigenvectors, LAPACK's copies, and its directions."""
    sizes = (
        out * width + 4 * min(out, width) ** 2 + 2 * width * min(out, width)
        for out, width in setting.protected
    )
    return Part("decomposing a weight", _DOUBLE * max(sizes))


def bases_size(setting: Setting) -> int:
    """Bytes of the protected directions: `directions` x in² of every input."""
    if projection := projection_of_weights(setting):
        return directions_of_weights(setting, projection)
    return int(FLOAT * setting.directions * sum(width**2 for width in setting.inputs))
