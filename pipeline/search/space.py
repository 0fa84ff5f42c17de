"""The space that a search varies: by default or from the config, and as Optuna knows it."""

from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from itertools import product
from typing import Any

import optuna
from agcl.errors import InputError
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from pipeline.config.config import Config
from pipeline.config.loading import changed
from pipeline.config.method import METHOD_SECTIONS, Gate, Penalty, Project
from pipeline.config.search import Choice, Dimension, Float, Int
from pipeline.config.sources import sources

Settings = dict[str, Any]
"""Values by dotted config key."""
SEARCHABLE = ("training", *METHOD_SECTIONS)
"""Config sections that a search may vary. Trials on other rows or another model would not be
comparable."""
RATE_FACTOR = 4.0
"""By default the learning rate varies from a quarter of the config's to four times it."""
AVERAGING_TOP_K = ("lrp", "grad_x_param")
"""Estimators that `importance.top_k` acts on."""

optuna.logging.set_verbosity(optuna.logging.ERROR)


def space_of(config: Config) -> dict[str, Dimension]:
    """The dimensions to search, by config key: the config's, or else the default ones.

    Raises `InputError` with the key that cannot be searched or has an invalid value.
    """
    space = config.search.space or default_space(config)
    for key, dimension in space.items():
        if key.partition(".")[0] not in SEARCHABLE or "." not in key:
            raise InputError(
                f"search.space.{key}: only keys of {', '.join(SEARCHABLE)} can be searched"
            )
        for value in _extremes(dimension):
            try:
                changed(config, {key: value})
            except InputError as error:
                why = str(error).removeprefix(f"{key}: ")
                raise InputError(f"search.space.{key}: {why}") from None
    return space


def default_space(config: Config) -> dict[str, Dimension]:
    """The learning rate, and how strongly each protection scales by the importances.

    Every range includes the config's own value, so that a search can start from the config.
    """
    rate = config.training.learning_rate
    space: dict[str, Dimension] = {
        "training.learning_rate": _loguniform(rate / RATE_FACTOR, rate * RATE_FACTOR, rate)
    }
    projects = any(isinstance(item, Project) for item in config.measured)
    if config.search.objective == "base_and_average" and config.base.protect != "none" and projects:
        space["base.energy"] = _energies(config.base.energy, config)
    for index, item in enumerate(config.protect):
        if not protects(config, index):
            continue
        at = f"protect.{index}"
        match item:
            case Gate():
                space |= {
                    f"{at}.log_scale": _loguniform(1e1, 1e7, item.log_scale),
                    f"{at}.strength": _uniform(0.25, 1.0, item.strength),
                    f"{at}.exponent": _loguniform(0.25, 4.0, item.exponent),
                }
                if config.importance.estimator in AVERAGING_TOP_K:
                    values = sorted({1, 4, 16, config.importance.top_k or 1})
                    space["importance.top_k"] = Choice(type="choice", values=(*values, None))
            case Project():
                space[f"{at}.energy"] = _energies(item.energy, config)
            case Penalty():
                space[f"{at}.strength"] = _loguniform(1e1, 1e7, item.strength)
    return space


def protects(config: Config, index: int) -> bool:
    """Whether an item of `protect` acts at all: a single task has no earlier ones to protect.

    Its settings then act on the base model, if that is protected. A projection's do not: the base
    has an energy of its own.
    """
    item = config.protect[index]
    if len(sources(config)) > 1 or config.importance.past or not item.needs_importance:
        return True
    return not isinstance(item, Project) and config.base.protect != "none"


def _loguniform(low: float, high: float, own: float) -> Float:
    """A range that includes the config's own value, but for 0, which no logarithm reaches."""
    return Float(type="loguniform", low=min(low, own or low), high=max(high, own))


def _uniform(low: float, high: float, own: float) -> Float:
    return Float(type="uniform", low=min(low, own), high=max(high, own))


def _energies(own: float, config: Config) -> Float:
    high = max(own, min(0.95, config.importance.keep))  # More is not stored of a moment.
    low = min(0.5, own)
    return Float(type="uniform", low=low if low < high else high / 2, high=high)


def distributions(space: Mapping[str, Dimension]) -> dict[str, BaseDistribution]:
    """The space as Optuna knows it."""
    return {key: _distribution(dimension) for key, dimension in space.items()}


def own_point(config: Config, space: Mapping[str, Dimension]) -> Settings | None:
    """The config's own values as a point of the space; None if it lies outside."""
    raw = config.model_dump(mode="json")
    try:
        point = {key: reduce(_step, key.split("."), raw) for key in space}
    except (KeyError, IndexError, TypeError):
        return None
    inside = all(_contains(dimension, point[key]) for key, dimension in space.items())
    return point if inside else None


def corners(space: Mapping[str, Dimension]) -> Iterator[tuple[Settings, Settings]]:
    """Pairs of points that differ in every dimension with more than one value.

    A stage that is the same at both is the same at every point. There are several pairs since
    values that can be combined with the rest of the config may exclude each other.
    """
    ends = [(values[0], values[-1]) for values in map(_extremes, space.values())]
    for flips in product((False, True), repeat=max(0, len(ends) - 1)):
        turned = [
            end[:: -1 if flip else 1] for end, flip in zip(ends, (False, *flips), strict=True)
        ]
        one, other = (dict(zip(space, point, strict=True)) for point in zip(*turned, strict=True))
        yield one, other


def _step(node: Any, part: str) -> Any:
    return node[int(part)] if isinstance(node, list) else node[part]


def _contains(dimension: Dimension, value: Any) -> bool:
    if isinstance(dimension, Choice):
        return value in dimension.values
    return value is not None and bool(dimension.low <= value <= dimension.high)


def _extremes(dimension: Dimension) -> Sequence[Any]:
    return dimension.values if isinstance(dimension, Choice) else (dimension.low, dimension.high)


def _distribution(dimension: Dimension) -> BaseDistribution:
    if isinstance(dimension, Choice):
        return CategoricalDistribution(dimension.values)
    if isinstance(dimension, Int):
        return IntDistribution(dimension.low, dimension.high)
    return FloatDistribution(dimension.low, dimension.high, log=dimension.type == "loguniform")
