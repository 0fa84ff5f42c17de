"""The config sections that change no result: where a run computes, and where it is recorded."""

import os
from typing import Annotated, Literal

from pydantic import (
    BeforeValidator,
    Field,
    SerializationInfo,
    field_serializer,
    model_validator,
)

from pipeline.config.section import NAME, Positive, Section
from pipeline.secrets import masked

CREDENTIALS = {"credentials": True}
"""Context of `model_dump` for a config that is used, not written: keeps the credentials."""


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


def is_server(uri: str) -> bool:
    """Whether an MLflow URI is a server's. A database's says nothing of where files go."""
    return uri.lower().startswith(("http:", "https:", "databricks"))


class Tracking(Section):
    """Recording in MLflow."""

    uri: str | None = Field(
        default_factory=lambda: os.environ.get("MLFLOW_TRACKING_URI"), min_length=1
    )
    """MLflow tracking URI; defaults to the environment variable `MLFLOW_TRACKING_URI`. Null is a
    sqlite file in the storage folder; with an object store it must be a server's. Credentials in it
    are used but never written; prefer MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."""
    enabled: bool = True
    experiment: str = Field("agcl", min_length=1, max_length=250)
    """MLflow experiment of all runs, created if there is none."""
    report_to: Annotated[
        tuple[Literal["jsonl", "tensorboard"], ...],
        BeforeValidator(lambda given: [given] if isinstance(given, str) else given),
    ] = ()
    """Metrics as plain files in the run's folder too, with or without MLflow: `metrics.jsonl`, and
    event files in `tensorboard/`."""
    register_model: str | None = Field(None, pattern=NAME, max_length=100)
    """Register the final model in MLflow under this name, which copies its files there."""

    @field_serializer("uri")
    def _without_credentials(self, uri: str | None, info: SerializationInfo) -> str | None:
        return uri if uri is None or info.context == CREDENTIALS else masked(uri)
