"""What a search varies: the space of a config, its points, and what no point changes."""

from collections.abc import Iterator, Mapping
from functools import reduce
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
from pipeline.config.method import Gate, Penalty, Project
from pipeline.config.search import Choice, Dimension, Int, LogUniform, Uniform

Settings = dict[str, Any]
"""Values by dotted config key."""
SEARCHABLE = ("training", "importance", "protect", "replay", "freeze", "adapter")
"""Sections that a search may vary: with other rows or another model, trials could not be
compared."""
_LEARNING_RATE = 4.0
"""The learning rate is sought from a quarter of the config's to four times it."""

optuna.logging.set_verbosity(optuna.logging.ERROR)


def space_of(config: Config) -> dict[str, Dimension]:
    """The dimensions to search, by config key: those that the config names, or the default ones.

    Raises `InputError` naming the key that cannot be searched, or whose values are not valid.
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
    """The scaling of the importances by what protects with them, and the learning rate."""
    rate = config.training.learning_rate
    space: dict[str, Dimension] = {
        "training.learning_rate": LogUniform(
            type="loguniform", low=rate / _LEARNING_RATE, high=rate * _LEARNING_RATE
        )
    }
    for index, item in enumerate(config.protect):
        at = f"protect.{index}"
        match item:
            case Gate():
                space |= {
                    f"{at}.log_scale": LogUniform(type="loguniform", low=1e1, high=1e7),
                    f"{at}.strength": Uniform(type="uniform", low=0.25, high=1.0),
                    f"{at}.exponent": LogUniform(type="loguniform", low=0.25, high=4.0),
                    "importance.top_k": Choice(type="choice", values=(1, 4, 16, None)),
                }
            case Project():
                space[f"{at}.energy"] = Uniform(type="uniform", low=0.5, high=0.98)
            case Penalty():
                space[f"{at}.strength"] = LogUniform(type="loguniform", low=1e1, high=1e7)
    return space


def distributions(space: Mapping[str, Dimension]) -> dict[str, BaseDistribution]:
    """The space as Optuna knows it; a choice is among the indices of its values."""
    return {key: _distribution(dimension) for key, dimension in space.items()}


def settings_of(space: Mapping[str, Dimension], params: Mapping[str, Any]) -> Settings:
    """The settings of a point that Optuna drew."""
    return {
        key: dimension.values[params[key]] if isinstance(dimension, Choice) else params[key]
        for key, dimension in space.items()
    }


def own_point(config: Config, space: Mapping[str, Dimension]) -> dict[str, Any] | None:
    """The config itself as a point for Optuna; None where it lies outside of the space."""
    point: dict[str, Any] = {}
    raw = config.model_dump(mode="json")
    for key, dimension in space.items():
        value: Any
        try:
            value = reduce(_step, key.split("."), raw)
        except (KeyError, IndexError, TypeError):
            return None
        if isinstance(dimension, Choice):
            if value not in dimension.values:
                return None
            value = dimension.values.index(value)
        elif value is None or not dimension.low <= value <= dimension.high:
            return None
        point[key] = value
    return point


def corners(space: Mapping[str, Dimension]) -> tuple[Settings, Settings]:
    """Two points that differ in every dimension with more than one value.

    What is the same in the stages of both, no point changes.
    """
    ends = {key: list(_extremes(dimension)) for key, dimension in space.items()}
    return {k: values[0] for k, values in ends.items()}, {k: v[-1] for k, v in ends.items()}


def _step(node: Any, part: str) -> Any:
    return node[int(part)] if isinstance(node, list) else node[part]


def _extremes(dimension: Dimension) -> Iterator[Any]:
    if isinstance(dimension, Choice):
        yield from dimension.values
    else:
        yield from (dimension.low, dimension.high)


def _distribution(dimension: Dimension) -> BaseDistribution:
    match dimension:
        case Uniform():
            return FloatDistribution(dimension.low, dimension.high)
        case LogUniform():
            return FloatDistribution(dimension.low, dimension.high, log=True)
        case Int():
            return IntDistribution(dimension.low, dimension.high)
        case Choice():
            return CategoricalDistribution(range(len(dimension.values)))
