"""What a stage gets besides its config and inputs: device, log, and the model held in memory."""

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from agcl.files.checkpoint import Checkpoint
from agcl.model import adapter, models
from agcl.parallel import distributed, sharding
from agcl.train import Log
from transformers import PreTrainedModel

from pipeline.stages.files import ADAPTER

Record = dict[str, float | str]
Emit = Callable[[list[Record]], None]
"""Takes records in order: `{"artifact", "state", ...}` or `{"artifact", "step", metric: value}`.

`artifact` is the name of its folder."""


@dataclass
class Context:
    """One worker's view of its session. The defaults are those of a plain single process."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    log: Log = field(default=lambda metrics, step: None)
    """Records metrics of the running stage by step."""
    warn: Callable[[str], None] = field(default=lambda line: None)
    """Shows one line to the user, and records it."""
    folder: Path = Path()
    """Where the running stage's out_dir is moved when the stage is complete."""
    shard_model: bool = False
    """Whether the model is sharded across the workers."""
    ray_data: bool = True
    """Whether prepare stages encode rows with Ray Data, or in this process."""
    checkpoint_minutes: float = 0.0
    checkpoint: Checkpoint | None = None
    """Where the running stage saves its training state, and resumes from."""
    held: dict[Path, PreTrainedModel] = field(default_factory=dict)

    @property
    def is_rank_zero(self) -> bool:
        """Whether this is rank 0, which writes the artifacts."""
        return distributed.rank() == 0

    def take_model(self, folder: Path, config: Mapping[str, Any]) -> PreTrainedModel:
        """The model of an artifact, from memory if the last stage left it there.

        Loaded as `loading` of the stage's `config` says; a model held in another dtype is loaded
        again. The caller may change it; `hold_model` returns it.
        """
        model = self.held.pop(folder, None)
        self.held.clear()
        dtype = getattr(torch, config["loading"]["dtype"])
        if model is not None and model.dtype == dtype:
            return model
        del model  # Before another copy takes memory.
        if self.shard_model:
            gc.collect()  # Cycles keep a sharded one.
        return self.loaded(folder, config)

    def loaded(self, folder: Path, config: Mapping[str, Any]) -> PreTrainedModel:
        """A model from its files, as `loading` of a stage's `config` says.

        Collective: call on every rank.
        """
        model = models.load_model(folder, **config["loading"])
        distributed.meet()  # Ranks may read it from disks of different speed.
        return self.placed(model)

    def placed(self, model: PreTrainedModel) -> PreTrainedModel:
        """Move a new model to this worker's device, sharded if the session shards models."""
        if self.shard_model:
            return sharding.shard(model, self.device)
        return model.to(self.device)

    def hold_model(self, model: PreTrainedModel, folder: Path) -> None:
        """Keep the model of artifact `folder` in memory, for the next stage's `take_model`."""
        self.held[folder] = model

    @contextmanager
    def borrowed_model(
        self, inputs: Mapping[str, Path], config: Mapping[str, Any]
    ) -> Iterator[PreTrainedModel]:
        """Lend the input `model`, with the input `adapter` on it if there is one.

        The caller must not change the model's weights: the next stage gets the same object.
        """
        model, peft_model = self.take_model(inputs["model"], config), None
        if "adapter" in inputs:
            peft_model = adapter.load(model, inputs["adapter"] / ADAPTER)
        yield peft_model.get_base_model() if peft_model else model
        self.hold_model(adapter.removed(peft_model) if peft_model else model, inputs["model"])
