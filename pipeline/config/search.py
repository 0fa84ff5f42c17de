"""The config's `search`: what `agcl search` varies, and how it chooses settings."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config.section import Positive, Section


class Float(Section):
    """A number between two bounds; `loguniform`: a positive one, uniform in its logarithm."""

    type: Literal["uniform", "loguniform"]
    low: float
    high: float

    @model_validator(mode="after")
    def _positive(self) -> "Float":
        if self.type == "loguniform" and not self.low > 0:
            raise ValueError("low: must be above 0")
        return self


class Int(Section):
    """An integer between two bounds, both inclusive."""

    type: Literal["int"]
    low: int
    high: int


Value = bool | int | float | str | None


class Choice(Section):
    """One of several values."""

    type: Literal["choice"]
    values: tuple[Value, ...] = Field(min_length=1)


Dimension = Annotated[Float | Int | Choice, Field(discriminator="type")]


class SearchSection(Section):
    """What `agcl search` varies and how (Ray Tune, Optuna). Runs ignore this section."""

    space: dict[str, Dimension] = Field(default_factory=dict)
    """By config key, such as `protect.0.energy`; empty takes the scaling of the method's
    protections and the learning rate."""
    searcher: Literal["tpe", "random"] = "tpe"
    """Optuna's tree-structured Parzen estimator, or random search."""
    objective: Literal["average", "retained_and_learned", "base_and_average"] = "average"
    """Maximize the average performance, or find a Pareto front: of retention of earlier tasks and
    learning of new ones, or of what the base model still knows and the average. Tasks are scored on
    validation rows. The base model by its facts if it is the built-in one, otherwise by the loss on
    `evaluation.text`; the best trial is then the one with the highest average that keeps at least
    as much of it as the config's own settings."""
    stopping: Literal["none", "asha", "median"] = "none"
    """Stop bad trials after a task of the sequence. With trials side by side, which ones stop
    depends on their speed and can differ from run to run; nothing else can."""
    round: Positive = 4
    """Trials per round. They are chosen together, from the results of earlier rounds, so that the
    choice does not depend on how many run side by side."""

    @model_validator(mode="after")
    def _ordered(self) -> "SearchSection":
        for key, dimension in self.space.items():
            if not isinstance(dimension, Choice) and not dimension.low < dimension.high:
                raise ValueError(f"space.{key}: low must be below high")
        return self
