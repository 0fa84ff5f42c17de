"""The config: frozen sections of settings. Unknown keys are errors."""

import os
from typing import Annotated

from pydantic import Field, model_validator

from pipeline.config.conflicts import conflicts
from pipeline.config.method import (
    Adapter,
    Base,
    Freeze,
    Gate,
    Importance,
    Loss,
    Merge,
    Penalty,
    Project,
    Replay,
    Subspace,
)
from pipeline.config.model import Model
from pipeline.config.resources import Resources, Tracking
from pipeline.config.search import SearchSection
from pipeline.config.section import NAME, Section, Seed, StoragePlace
from pipeline.config.tasks import FactsTasks, TaskFormat
from pipeline.config.training import Evaluation, Training


class Config(Section):
    """One method on one sequence of tasks."""

    name: str = Field("run", pattern=NAME, max_length=100)
    """Folder of the run in `storage`."""
    method: str = "agcl"
    """Preset of the sections `importance`, `protect`, `base`, `replay`, `freeze`, `loss`,
    `merge`, `adapter` and `subspace` (`pipeline/config/presets.py`)."""
    seed: Seed = 0
    storage: StoragePlace = Field(
        default_factory=lambda: os.environ.get("AGCL_STORAGE", "storage"), validate_default=True
    )
    """Folder of all runs and artifacts, by default that of the environment's `AGCL_STORAGE`; shared
    by all nodes of a cluster. Or the URI of an object store, `s3://bucket/prefix` or `gs://...`;
    nodes then need to share nothing, and each keeps copies in the folder `AGCL_CACHE`
    (`~/.cache/agcl`) of its own disk, which may be deleted while nothing runs."""
    model: Model = Model()
    tasks: TaskFormat = Field(FactsTasks(), discriminator="format")
    training: Training = Training()
    importance: Importance = Importance()
    protect: tuple[Annotated[Gate | Project | Penalty, Field(discriminator="kind")], ...] = ()
    """How earlier tasks are protected while later ones are trained; all items apply."""
    base: Base = Base()
    replay: Replay = Replay()
    freeze: Freeze = Freeze()
    loss: Loss = Loss()
    merge: Merge | None = None
    adapter: Adapter | None = None
    subspace: Subspace | None = None
    evaluation: Evaluation = Evaluation()
    resources: Resources = Resources()
    tracking: Tracking = Field(default_factory=Tracking)
    search: SearchSection = SearchSection()

    @property
    def measured(self) -> tuple[Gate | Project | Penalty, ...]:
        """The items of `protect` that need an importance; without one nothing is attributed."""
        return tuple(item for item in self.protect if item.needs_importance)

    @property
    def measures_entries(self) -> bool:
        """`importance.entries`, or if that is null whether something needs it."""
        given = self.importance.entries
        return bool(self.needing_entries) if given is None else given

    @property
    def measures_base(self) -> bool:
        """Whether `base.protect` has an effect: for what is protected, or for CorDA."""
        return self.base.protect != "none" and (bool(self.measured) or self.starts_from_corda)

    @property
    def measures_solos(self) -> bool:
        """Whether every task is also trained alone, to measure its importance."""
        return bool(self.measured) and self.importance.source == "solo"

    @property
    def sums_moments(self) -> bool:
        """Whether attribution keeps a running sum, since only moments of the sequence count."""
        kinds = {item.kind for item in self.measured}
        return kinds == {"project"} and not self.measures_solos

    @property
    def starts_from_corda(self) -> bool:
        """Whether an adapter starts from a decomposition of the base model's weights."""
        return self.adapter is not None and self.adapter.init == "corda"

    @property
    def trains_factors(self) -> bool:
        """Whether float32 factors are trained, of an adapter or a subspace, and no weights."""
        return self.adapter is not None or self.subspace is not None

    @property
    def needing_entries(self) -> list[str]:
        """The settings that need the importance of every weight, as error messages name them."""
        needing = [f"protect kind {item.kind}" for item in self.protect if item.kind != "project"]
        if self.importance.permuted:
            needing.append("importance.permuted")
        if self.importance.estimator in ("magnitude", "random"):
            needing.append(f"estimator {self.importance.estimator}")
        return needing

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        for conflict in conflicts(self):
            raise ValueError(conflict)
        return self
