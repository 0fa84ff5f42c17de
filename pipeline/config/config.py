"""The config: frozen sections of settings, unknown keys forbidden."""

import os
from pathlib import Path
from typing import Annotated, Literal

from agcl.schedule import Schedule
from pydantic import AfterValidator, Field, SerializationInfo, field_serializer, model_validator

from pipeline.config.method import Adapter, Freeze, Gate, Importance, Penalty, Project, Replay
from pipeline.config.search import Search
from pipeline.config.section import (
    Place,
    Positive,
    Precision,
    Section,
    Seed,
    Share,
    Storage,
    usable_path,
)
from pipeline.config.tasks import FactsTasks, TaskFormat
from pipeline.secrets import masked
from pipeline.storage.object_store import cache_of

UNPROTECTED = ("sequential", "joint", "solo")
RESERVED_NAMES = ("stages", "mlflow.db", "mlartifacts")
"""What a storage folder holds beside runs."""
CREDENTIALS = {"credentials": True}
"""Context of `model_dump` for a config that is to be used, not written."""
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class Pretraining(Section):
    """How the built-in model learns its generic facts before the sequence."""

    entities: Positive = 120
    """People in the generic facts, four facts each."""
    epochs: Positive = 16
    learning_rate: float = Field(2e-3, gt=0)
    batch_size: Positive = 32


class Model(Section):
    """The model that goes through the sequence."""

    path: Annotated[str, AfterValidator(usable_path)] = "builtin"
    """`builtin`, or a folder with a Hugging Face causal language model in safetensors."""
    pretraining: Pretraining = Pretraining()
    """Used for `builtin` only."""


class Training(Section):
    """How each task is trained. A fresh optimizer for every task."""

    learning_rate: float = Field(1e-4, gt=0)
    """AdamW's, at its height."""
    schedule: Schedule = "constant"
    """How the learning rate goes over each task's steps: it stays, or falls towards 0, `linear` or
    by half a `cosine`."""
    warmup: Share = 0.0
    """Share of each task's steps over which the learning rate first rises from 0."""
    epochs: Positive = 8
    """Passes over each task's training rows."""
    batch_size: Positive = 16
    """Rows an optimizer step, all workers together."""
    micro_batch_size: Positive = 16
    """Rows a forward pass. Workers share a batch's micro-batches, so with W workers set it to at
    most batch_size / W; results depend on it only by rounding."""
    weight_decay: float = Field(0.01, ge=0)
    max_gradient_norm: float = Field(1.0, gt=0)
    precision: Precision = "float32"
    """`bfloat16` is autocast; weights and optimizer stay float32."""
    activation_checkpointing: bool = False
    """Compute each layer's activations again in the backward pass: about a third more time, and
    memory for those of one layer instead of all. The result is the same."""
    packing: bool = False
    """Put a micro-batch's rows behind each other in place of padding them to the longest, each
    still seeing only itself. Worth it where much would be padding: large micro-batches of rows of
    unlike length. Results depend on it only by rounding."""
    compile: bool = False
    """Train through `torch.compile`, which needs a C++ compiler. Half a minute or more to compile,
    then some 6 % off a step of a 135M model on a CPU, if anything: for tasks of hundreds of steps.
    Results depend on it only by rounding."""


class Evaluation(Section):
    """How tasks are scored: greedy decoding, by each task's own scorer."""

    batch_size: Positive = 64
    precision: Precision = "float32"
    rows: Literal["all", "validation"] = "all"
    """Score all rows, or (a search's trials do) only those that `validation` sets apart."""
    set: str | None = None
    """Evaluation set of the headline metrics; null takes the format's first."""
    scorers: tuple[str, ...] = ()
    """More scorers for all tasks, by a name in `agcl/scoring/scorers.py` or
    `package.module:function`; each makes an evaluation set of its own, `test-rouge_l`."""
    max_new_tokens: Positive | None = None
    """Longest text that is decoded, for scorers that need text; null takes the longest answer of
    the scored rows."""
    validation: float = Field(0.0, ge=0, lt=1)
    """Share of the rows that settings may be chosen by: of the training rows, which are then not
    trained on (or all rows of the task's own validation split), or, where the trained rows are what
    is scored, of those. No other metric counts them."""
    text: Place | None = None
    """Text file (UTF-8) on which the loss of the language model is measured before and after every
    task: what training costs its other skills."""
    text_tokens: int = Field(20_000, ge=2)
    """At most this many tokens, from the beginning of the text."""


class Resources(Section):
    """What each Ray Train session gets."""

    num_workers: Positive = 1
    cpus_per_worker: Positive = 1
    """CPU cores, and threads, a worker."""
    gpus_per_worker: float = Field(0.0, ge=0, le=1)
    """1 for a GPU a worker, with nccl. A part of one, such as 0.25, where the runs of a comparison,
    of one worker each, shall share it; nobody divides its memory among them."""
    shard_model: bool = False
    """Share the model among the workers (FSDP2), for one that no device holds whole with its
    gradients and optimizer state: each keeps a part of every weight, its Adam state and its gate,
    and whole layers for as long as they compute; while it is loaded, all of it in main memory.
    Slower; the same numbers to rounding. Attribution is then split by layers. With one worker there
    is nothing to share."""
    checkpoint_minutes: float = Field(10.0, ge=0)
    """How often training is written down inside a task, three times the model's size, so that a
    worker that is lost costs minutes; at most a twentieth of the time goes into it. 0: never."""


class Tracking(Section):
    """Where MLflow records runs."""

    uri: str | None = Field(
        default_factory=lambda: os.environ.get("MLFLOW_TRACKING_URI"), min_length=1
    )
    """MLflow tracking URI, by default that of the environment's `MLFLOW_TRACKING_URI`; null is a
    sqlite file in the storage folder. Credentials in it are used and never written: better give
    them by MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."""
    enabled: bool = True
    register_model: str | None = Field(None, pattern=_NAME, max_length=100)
    """Register the final model in MLflow under this name; its files are copied there."""

    @field_serializer("uri")
    def _without_credentials(self, uri: str | None, info: SerializationInfo) -> str | None:
        return uri if uri is None or info.context == CREDENTIALS else masked(uri)


class Config(Section):
    """One method over one sequence of tasks."""

    name: str = Field("run", pattern=_NAME, max_length=100)
    """Folder of the run under `storage`."""
    method: str = "agcl"
    """Preset of the sections `importance`, `protect`, `replay`, `freeze` and `adapter`
    (`pipeline/config/presets.py`)."""
    seed: Seed = 0
    storage: Storage = Field(
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
    """What later tasks must not change; applied together."""
    replay: Replay = Replay()
    freeze: Freeze = Freeze()
    adapter: Adapter | None = None
    evaluation: Evaluation = Evaluation()
    resources: Resources = Resources()
    tracking: Tracking = Field(default_factory=Tracking)
    search: Search = Search()

    @property
    def local_storage(self) -> Path:
        """Where runs and artifacts are on this machine: the storage folder or an object store's
        cache."""
        return self.storage if isinstance(self.storage, Path) else cache_of(self.storage)

    @property
    def measures_entries(self) -> bool:
        """`importance.entries`, or if that is null whether something needs it."""
        given = self.importance.entries
        return bool(self._needing_entries()) if given is None else given

    @model_validator(mode="after")
    def _gpus_can_be_had(self) -> "Config":
        if 0 < self.resources.gpus_per_worker < 0.01:
            raise ValueError("resources.gpus_per_worker: must be 0, or from 0.01 to 1")
        if self.resources.num_workers > 1 and self.resources.gpus_per_worker not in (0, 1):
            raise ValueError(
                "resources.gpus_per_worker: must be 0 or 1 with several workers; nccl refuses two "
                "on one GPU"
            )
        return self

    @model_validator(mode="after")
    def _shareable(self) -> "Config":
        if self.resources.shard_model and (self.adapter or self.training.compile):
            other = "an adapter" if self.adapter else "training.compile"
            raise ValueError(f"resources.shard_model: cannot be used with {other}")
        return self

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        if self.method in UNPROTECTED and (
            self.protect or self.replay.fraction or self.freeze != Freeze() or self.adapter
        ):
            raise ValueError(
                f"method: {self.method} protects nothing; choose another method for protect, "
                "replay, freeze or adapter"
            )
        if self.method == "agcl" and not self.protect:
            raise ValueError("protect: method agcl needs at least one protection")
        if self.adapter:
            self._check_adapter(self.adapter)
        if self.evaluation.rows == "validation" and not self.evaluation.validation:
            raise ValueError(
                "evaluation.validation: must be set where evaluation.rows is validation"
            )
        if self.name in RESERVED_NAMES:
            raise ValueError(f"name: {self.name!r} is a name that the storage folder uses itself")
        if isinstance(self.storage, str) and self.tracking.enabled and self.tracking.uri is None:
            raise ValueError(
                "tracking.uri: must be set where storage is an object store, which has no place "
                "for MLflow's sqlite file; or set tracking.enabled=false"
            )
        kinds = [item.kind for item in self.protect]
        if "project" in kinds[:-1] or len(set(kinds)) < len(kinds):
            raise ValueError("protect: one of each kind at most, and project last")
        if self.importance.entries is False and (needing := self._needing_entries()):
            raise ValueError(f"importance.entries: must be true for {needing[0]}")
        if self.model.path == "builtin" and self.importance.past:
            raise ValueError("importance.past: needs a model folder, not the builtin model")
        return self

    def _needing_entries(self) -> list[str]:
        """The settings that need the importance of every weight, as a message names them."""
        needing = [f"protect kind {item.kind}" for item in self.protect if item.kind != "project"]
        if self.importance.permuted:
            needing.append("importance.permuted")
        if self.importance.estimator in ("magnitude", "random"):
            needing.append(f"estimator {self.importance.estimator}")
        return needing

    def _check_adapter(self, adapter: Adapter) -> None:
        if adapter.orthogonal and not adapter.fresh:
            raise ValueError("adapter.orthogonal: needs adapter.fresh")
        if adapter.fresh and not adapter.merge:
            raise ValueError(
                "adapter.merge: must be true with adapter.fresh, whose later adapters stand on the "
                "earlier ones"
            )
        if adapter.fresh and any(item.kind != "project" for item in self.protect):
            raise ValueError(
                "protect: with adapter.fresh only project can be used: what entries of earlier "
                "factors were worth says nothing of fresh ones"
            )
        if self.protect and (self.importance.past or self.importance.source == "solo"):
            raise ValueError(
                "importance: with an adapter neither past nor source solo can be used: they are of "
                "other factors"
            )
