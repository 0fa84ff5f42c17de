"""The config: frozen sections of settings. Unknown keys are errors."""

import os
from collections.abc import Iterator
from typing import Annotated, Literal

from agcl.schedule import Schedule
from pydantic import (
    BeforeValidator,
    Field,
    SerializationInfo,
    field_serializer,
    model_validator,
)

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
from pipeline.config.search import Search
from pipeline.config.section import (
    Place,
    Positive,
    Precision,
    Section,
    Seed,
    Share,
    StoragePlace,
)
from pipeline.config.tasks import FactsTasks, TaskFormat
from pipeline.secrets import masked

UNPROTECTED = ("sequential", "joint", "solo")
RESERVED_NAMES = ("stages", "mlflow.db", "mlartifacts")
"""Names in the storage folder that are not runs."""
CREDENTIALS = {"credentials": True}
"""Context of `model_dump` for a config that is used, not written: keeps the credentials."""
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class Training(Section):
    """How each task is trained. Every task starts with a new optimizer."""

    learning_rate: float = Field(1e-4, gt=0)
    """Peak learning rate."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """`sgd` is for comparisons: with it a gate on the gradient scales the whole step, which under
    Adam cancels. Needs a learning rate hundreds of times higher."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Of `sgd`."""
    schedule: Schedule = "constant"
    """Learning rate over the steps of each task: `constant`, or decaying to 0, `linear` or as half
    a `cosine`."""
    warmup: Share = 0.0
    """Share of each task's steps in which the learning rate rises from 0."""
    epochs: Positive = 8
    """Passes over each task's training rows."""
    batch_size: Positive = 16
    """Rows per optimizer step, over all workers."""
    max_tokens: Positive = 8192
    """Maximum tokens per forward pass of a worker, padding included; a longer row is alone. Sets
    how much memory activations take. Workers take a batch's micro-batches in turn, so with W
    workers keep it below a W-th of a batch. Changes results by rounding only."""
    micro_batch_size: Positive | None = None
    """Maximum rows per forward pass as well; null: as many as `max_tokens` allow."""
    weight_decay: float = Field(0.01, ge=0)
    max_gradient_norm: float = Field(1.0, gt=0)
    precision: Precision = "float32"
    """`bfloat16` means autocast; weights and optimizer state stay as `model.dtype` has them."""
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    """How steps are rounded into weights of `model.dtype: bfloat16`; no effect on others, nor with
    an adapter, whose factors are float32. `stochastic`: up or down by chance, from the seed, so
    that small steps count in expectation; the optimizer state is float32. `nearest` loses steps
    below about 1/500 of a weight, and cannot be combined with `protect`."""
    activation_checkpointing: bool = False
    """Recompute each layer's activations in the backward pass: about a third more time, and memory
    for the activations of one layer instead of all. Does not change results."""
    packing: bool = False
    """Concatenate a micro-batch's rows instead of padding them to the longest; rows do not attend
    to each other. Faster for large micro-batches with rows of different lengths. Changes results
    by rounding only."""
    compile: bool = False
    """Train with `torch.compile`, which needs a C++ compiler. Compiling takes half a minute or more
    and saved up to 6 % per step of a 135M model on a CPU, so it pays off for tasks of hundreds of
    steps. Changes results by rounding only."""


class Evaluation(Section):
    """How tasks are scored: greedy decoding, then each task's scorer."""

    batch_size: Positive = 64
    precision: Precision = "float32"
    rows: Literal["all", "validation"] = "all"
    """Score all rows, or only the validation rows, as the trials of a search do."""
    set: str | None = None
    """Evaluation set of the headline metrics; null takes the first one of the format."""
    scorers: tuple[str, ...] = ()
    """Additional scorers for all tasks: names in `agcl/scoring/scorers.py`, or
    `package.module:function`. Each adds an evaluation set such as `test-rouge_l`."""
    max_new_tokens: Positive | None = None
    """Maximum length of decoded text, for scorers that need text; null takes the length of the
    longest expected answer."""
    validation: float = Field(0.0, ge=0, lt=1)
    """Share of rows held out for choosing settings; the test metrics leave them out. It is a share
    of the training rows, which are then not trained on (if a task has a validation split, that is
    used instead), or of the scored rows for tasks that are scored on their training rows."""
    text: Place | None = None
    """Text file (UTF-8) to measure the language-model loss on, before and after every task: what
    training costs the model's other skills."""
    text_tokens: int = Field(20_000, ge=2)
    """Maximum tokens, from the beginning of the text."""
    probes: tuple[Place, ...] = ()
    """Files of multiple-choice questions, to measure general skills before and after every task as
    lm-evaluation-harness does: JSON Lines of `{"context": ..., "choices": [...], "answer": index}`.
    A probe is called by its file's name without extension. Not scored in a search's trials."""
    probe_rows: Positive | None = 500
    """Maximum questions per probe, the same random ones every time; null takes all."""

    @model_validator(mode="after")
    def _consistent(self) -> "Evaluation":
        if self.rows == "validation" and not self.validation:
            raise ValueError("validation: required if rows is validation")
        names = [file.stem for file in self.probes]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"probes: two files are called {name!r}; rename one")
        return self


class Resources(Section):
    """Resources of each Ray Train session."""

    num_workers: Positive = 1
    cpus_per_worker: Positive = 1
    """CPU cores and threads per worker."""
    gpus_per_worker: float = Field(0.0, ge=0, le=1)
    """1 gives each worker a GPU and uses nccl. With one worker per run, a fraction such as 0.25
    lets the runs of a comparison share a GPU; its memory is not partitioned between them."""
    shard_model: bool = False
    """Shard the model across the workers (FSDP2), if it does not fit on one device with its
    gradients and optimizer state. Each worker stores a shard of every weight, its Adam state and
    its gate, gathers a layer while it computes, and needs main memory for the whole model while it
    loads. An adapter's factors are not sharded, only the weights below them. Slower; changes
    results by rounding only. Attribution is then split by layers. No effect with one worker."""
    checkpoint_minutes: float = Field(10.0, ge=0)
    """How often to checkpoint within a task, so that losing a worker costs minutes. A checkpoint is
    three times the model's size (five times with bfloat16 weights), written less often if that
    would cost more than 5 % of the time. 0 turns checkpoints off."""
    timeout_minutes: float = Field(60.0, gt=0)
    """How long a worker waits for another one in a collective before it counts as lost. Waiting for
    files does not count: downloads, uploads, checkpoints, or an artifact that another run makes."""

    @model_validator(mode="after")
    def _gpus_can_be_allocated(self) -> "Resources":
        if 0 < self.gpus_per_worker < 0.01:
            raise ValueError("gpus_per_worker: must be 0, or from 0.01 to 1")
        if self.num_workers > 1 and self.gpus_per_worker not in (0, 1):
            raise ValueError(
                "gpus_per_worker: must be 0 or 1 with several workers; nccl does not support two "
                "workers on one GPU"
            )
        return self


class Tracking(Section):
    """Recording in MLflow."""

    uri: str | None = Field(
        default_factory=lambda: os.environ.get("MLFLOW_TRACKING_URI"), min_length=1
    )
    """MLflow tracking URI; defaults to the environment variable `MLFLOW_TRACKING_URI`. Null is a
    sqlite file in the storage folder. Credentials in it are used but never written; prefer
    MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."""
    enabled: bool = True
    experiment: str = Field("agcl", min_length=1, max_length=250)
    """MLflow experiment of all runs, created if there is none."""
    report_to: Annotated[
        tuple[Literal["jsonl", "tensorboard"], ...],
        BeforeValidator(lambda given: [given] if isinstance(given, str) else given),
    ] = ()
    """Metrics as plain files in the run's folder too, with or without MLflow: `metrics.jsonl`, and
    event files in `tensorboard/`."""
    register_model: str | None = Field(None, pattern=_NAME, max_length=100)
    """Register the final model in MLflow under this name, which copies its files there."""

    @field_serializer("uri")
    def _without_credentials(self, uri: str | None, info: SerializationInfo) -> str | None:
        return uri if uri is None or info.context == CREDENTIALS else masked(uri)


class Config(Section):
    """One method on one sequence of tasks."""

    name: str = Field("run", pattern=_NAME, max_length=100)
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
    search: Search = Search()

    @property
    def measured(self) -> tuple[Gate | Project | Penalty, ...]:
        """The items of `protect` that need an importance; without one nothing is attributed."""
        return tuple(item for item in self.protect if item.needs_importance)

    @property
    def measures_entries(self) -> bool:
        """`importance.entries`, or if that is null whether something needs it."""
        given = self.importance.entries
        return bool(self._needing_entries()) if given is None else given

    @property
    def starts_from_corda(self) -> bool:
        """Whether an adapter starts from a decomposition of the base model's weights."""
        return self.adapter is not None and self.adapter.init == "corda"

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        for conflict in (
            *self._conflicts(),
            *self._method_conflicts(),
            *self._energy_conflicts(),
            *(self._adapter_conflicts() if self.adapter else ()),
            *(self._subspace_conflicts() if self.subspace else ()),
        ):
            raise ValueError(conflict)
        return self

    def _conflicts(self) -> Iterator[str]:
        if self.name in RESERVED_NAMES:
            yield f"name: {self.name!r} is reserved in the storage folder"
        if self.resources.shard_model and self.training.compile:
            yield "resources.shard_model: cannot be combined with training.compile"
        if self.tracking.enabled and not (self.tracking.uri or self.storage.tracking_uri):
            yield (
                "tracking.uri: required if storage is an object store, which cannot hold MLflow's "
                "sqlite file; or set tracking.enabled=false"
            )
        if self.model.is_builtin and self.importance.past:
            yield "importance.past: needs a model folder, not the builtin model"

    def _method_conflicts(self) -> Iterator[str]:
        protects_base = self.base.protect != "none"
        # All tasks at once have no earlier task to protect, but there is the base model.
        protects = self.protect and not (self.method == "joint" and protects_base)
        others = (self.replay != Replay(), self.freeze != Freeze(), self.loss != Loss())
        parts = (self.merge, self.adapter, self.subspace)
        if self.method in UNPROTECTED and (protects or any(others) or any(parts)):
            yield (
                f"method: {self.method} protects nothing; choose another method for protect, "
                "replay, freeze, loss, merge, adapter or subspace"
            )
        if self.base.protect == "text" and self.base.text is None:
            yield "base.text: missing; give a text file or folder, or choose base.protect=self"
        if self.base.protect == "rows" and not (self.base.rows or self.model.is_builtin):
            yield "base.rows: missing; give rows in the form of tasks, or choose base.protect=self"
        if self.method == "agcl" and not self.protect:
            yield "protect: method agcl needs at least one protection"
        kinds = [item.kind for item in self.protect]
        if "project" in kinds[:-1] or len(set(kinds)) < len(kinds):
            yield "protect: at most one item of each kind, and project last"
        if self.importance.entries is False and (needing := self._needing_entries()):
            yield f"importance.entries: must be true for {needing[0]}"

    def _energy_conflicts(self) -> Iterator[str]:
        asked = [
            (f"protect.{number}.energy", item.energy)
            for number, item in enumerate(self.protect)
            if isinstance(item, Project) and item.needs_importance
        ]
        if asked and self.base.protect != "none":
            asked.append(("base.energy", self.base.energy))
        most = max((energy for _, energy in asked), default=0.0)
        for key, energy in asked:
            if energy > self.importance.keep:
                yield (
                    f"{key}: {energy:g} is more than importance.keep={self.importance.keep:g} "
                    f"stores of a moment; set importance.keep={most:g}, or lower the energy"
                )

    def _adapter_conflicts(self) -> Iterator[str]:
        if self.adapter and self.adapter.fresh and "gate" in {i.kind for i in self.protect}:
            yield (
                "protect: with adapter.fresh only project and penalty can be used; a gate of "
                "earlier factors does not apply to fresh ones"
            )
        if self.base.protect != "none" and {i.kind for i in self.protect} - {"project"}:
            yield (
                "base.protect: with an adapter only project can be used; the importance of the "
                "base model's weights does not apply to factors"
            )
        if self.merge and self.adapter and not self.adapter.fresh:
            yield "merge: with an adapter needs adapter.fresh, which adds each task to the weights"
        if self.loss.reference == "previous" and self.adapter and not self.adapter.merge:
            yield ("loss.reference: the previous task's model needs adapter.merge, which writes it")
        if any(not item.needs_importance for item in self.protect):
            yield (
                "protect: directions: weights cannot be used with an adapter, which leaves the "
                "weights as they are"
            )
        if self.starts_from_corda and self.base.protect == "none":
            yield "base.protect: adapter.init=corda needs a text; choose base.protect=self"
        if self.starts_from_corda and self.protect:
            yield "protect: cannot be combined with adapter.init=corda"
        if self.starts_from_corda and self.resources.shard_model:
            yield "adapter.init: corda cannot be combined with resources.shard_model"
        if self.protect and (self.importance.past or self.importance.source == "solo"):
            yield (
                "importance: with an adapter neither past nor source solo can be used; they belong "
                "to other factors"
            )

    def _subspace_conflicts(self) -> Iterator[str]:
        if self.adapter:
            yield "subspace: cannot be combined with adapter"
        if self.protect:
            yield (
                "subspace: cannot be combined with protect, whose importances belong to weights, "
                "not to the factors of their decomposition"
            )
        if self.resources.shard_model:
            yield "subspace: cannot be combined with resources.shard_model"

    def _needing_entries(self) -> list[str]:
        """The settings that need the importance of every weight, as error messages name them."""
        needing = [f"protect kind {item.kind}" for item in self.protect if item.kind != "project"]
        if self.importance.permuted:
            needing.append("importance.permuted")
        if self.importance.estimator in ("magnitude", "random"):
            needing.append(f"estimator {self.importance.estimator}")
        return needing
