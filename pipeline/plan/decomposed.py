"""Memory of decomposed weights (`subspace`), by a formula: those of the first task, the most."""

from pipeline.config.sources import sources
from pipeline.plan.setting import FLOAT, Part, Setting


def trained_factors(setting: Setting) -> int:
    """Numbers in the trained U, S and V of all layers."""
    pairs = zip(setting.shape.linears, _kept(setting), strict=True)
    return sum((min(linear) - rank) * (sum(linear) + 1) for linear, rank in pairs)


def held_factors(setting: Setting) -> list[Part]:
    """U, S and V, the same as they were, and what PEFT keeps of the leading directions.

    That is those of a weight's longer side, and none of a square one.
    """
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


def _kept(setting: Setting) -> list[int]:
    """Singular directions of every layer's weight that the first task keeps."""
    section = setting.config.subspace
    share = section.preserved(1, len(sources(setting.config))) if section else 0.0
    return [max(1, int(min(linear) * share)) for linear in setting.shape.linears]
