"""The config's `search`: what `agcl search` varies, and how it chooses."""

from contextlib import suppress
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from pipeline.config.section import Positive, Section


class Uniform(Section):
    """A number between two bounds."""

    type: Literal["uniform"]
    low: float
    high: float


class LogUniform(Section):
    """A positive number between two bounds, spread evenly over its logarithm."""

    type: Literal["loguniform"]
    low: float = Field(gt=0)
    high: float


class Int(Section):
    """A whole number between two bounds, both included."""

    type: Literal["int"]
    low: int
    high: int


def _number_if_it_is(value: Any) -> Any:
    """YAML reads 1e-3 as text."""
    if isinstance(value, str):
        with suppress(ValueError):
            return float(value)
    return value


Value = Annotated[bool | int | float | str | None, BeforeValidator(_number_if_it_is)]


class Choice(Section):
    """One of several values."""

    type: Literal["choice"]
    values: tuple[Value, ...] = Field(min_length=1)


Dimension = Annotated[Uniform | LogUniform | Int | Choice, Field(discriminator="type")]


class Search(Section):
    """What `agcl search` varies and how it chooses (Ray Tune, Optuna). A run does not look here."""

    space: dict[str, Dimension] = Field(default_factory=dict)
    """By config key, such as `protect.0.energy`; empty takes the scaling of the method's
    protections, and the learning rate."""
    searcher: Literal["tpe", "random"] = "tpe"
    """Optuna's tree-structured Parzen estimator, or random points."""
    objective: Literal["average", "retained_and_learned"] = "average"
    """Average performance; or its two sides, of which the Pareto front is sought: what is retained
    of the earlier tasks, and what is learned. On validation rows."""
    stopping: Literal["none", "asha", "median"] = "none"
    """End bad trials after a task of the sequence. Which ones are stopped depends on which are
    ahead, so with several at a time it can differ from run to run; nothing else does."""
    round: Positive = 4
    """Trials that are chosen together, from the results of all earlier rounds; they may run side by
    side. What is tried does not depend on how many do."""

    @model_validator(mode="after")
    def _ordered(self) -> "Search":
        for key, dimension in self.space.items():
            if not isinstance(dimension, Choice) and not dimension.low < dimension.high:
                raise ValueError(f"space.{key}: low must be below high")
        return self
