"""Settings of different sections that exclude each other, as lines that name the keys."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pipeline.config.method import Freeze, Loss, Project, Replay
from pipeline.config.presets import BOUNDS
from pipeline.config.resources import is_server
from pipeline.storage.storage import DATABASE, STAGES

if TYPE_CHECKING:
    from pipeline.config.config import Config

UNPROTECTED = ("sequential", *BOUNDS)
RESERVED_NAMES = (STAGES, DATABASE, "mlartifacts")
"""Names in the storage folder that are not runs."""


def conflicts(config: "Config") -> Iterator[str]:
    """What is wrong with the config, a line each."""
    yield from _of_the_run(config)
    yield from _of_the_method(config)
    yield from _of_energies(config)
    if config.model.quantization:
        yield from _with_quantization(config)
    if config.adapter:
        yield from _with_an_adapter(config)
    if config.subspace:
        yield from _with_a_subspace(config)


def _of_the_run(config: "Config") -> Iterator[str]:
    if config.name in RESERVED_NAMES:
        yield f"name: {config.name!r} is reserved in the storage folder"
    if config.resources.shard_model and config.training.compile:
        yield "resources.shard_model: cannot be combined with training.compile"
    if config.resources.shard_model and config.training.optimizer == "adamw_8bit":
        yield "training.optimizer: adamw_8bit cannot be combined with resources.shard_model"
    if config.training.packing and config.model.attention == "flash_attention_2":
        # transformers' mask for it knows rows in a batch of one line only.
        yield "training.packing: cannot be combined with model.attention=flash_attention_2"
    if config.tracking.enabled and not config.storage.tracking_uri:
        yield from _of_tracking_beside_a_bucket(config.tracking.uri)
    if config.model.is_builtin and config.importance.past:
        yield "importance.past: needs a model folder, not the builtin model"


def _of_tracking_beside_a_bucket(uri: str | None) -> Iterator[str]:
    if uri is None:
        yield (
            "tracking.uri: required if storage is an object store, which cannot hold MLflow's "
            "sqlite file; or set tracking.enabled=false"
        )
    elif not is_server(uri):
        yield (
            "tracking.uri: must be a server (http://...) if storage is an object store; MLflow "
            "would keep its files, registered models too, in this machine's cache"
        )


def _of_the_method(config: "Config") -> Iterator[str]:
    protects_base = config.base.protect != "none"
    # All tasks at once have no earlier task to protect, but there is the base model.
    protects = config.protect and not (config.method == "joint" and protects_base)
    others = (config.replay != Replay(), config.freeze != Freeze(), config.loss != Loss())
    parts = (config.merge, config.adapter, config.subspace)
    if config.method in UNPROTECTED and (protects or any(others) or any(parts)):
        yield (
            f"method: {config.method} protects nothing; choose another method for protect, "
            "replay, freeze, loss, merge, adapter or subspace"
        )
    if config.base.protect == "text" and config.base.text is None:
        yield "base.text: missing; give a text file or folder, or choose base.protect=self"
    if config.base.protect == "rows" and not (config.base.rows or config.model.is_builtin):
        yield "base.rows: missing; give rows in the form of tasks, or choose base.protect=self"
    if config.method == "agcl" and not config.protect:
        yield "protect: method agcl needs at least one protection"
    kinds = [item.kind for item in config.protect]
    if "project" in kinds[:-1] or len(set(kinds)) < len(kinds):
        yield "protect: at most one item of each kind, and project last"
    if config.importance.entries is False and (needing := config.needing_entries):
        yield f"importance.entries: must be true for {needing[0]}"


def _of_energies(config: "Config") -> Iterator[str]:
    asked = [
        (f"protect.{number}.energy", item.energy)
        for number, item in enumerate(config.protect)
        if isinstance(item, Project) and item.needs_importance
    ]
    if asked and config.base.protect != "none":
        asked.append(("base.energy", config.base.energy))
    most = max((energy for _, energy in asked), default=0.0)
    for key, energy in asked:
        if energy > config.importance.keep:
            yield (
                f"{key}: {energy:g} is more than importance.keep={config.importance.keep:g} "
                f"stores of a moment; set importance.keep={most:g}, or lower the energy"
            )


def _with_quantization(config: "Config") -> Iterator[str]:
    if config.adapter is None or config.adapter.merge:
        yield (
            "model.quantization: weights in four bits can only be trained through an adapter that "
            "is not merged; choose method=lora_agcl or lora, and adapter.merge=false"
        )
    if config.starts_from_corda:
        yield "model.quantization: adapter.init=corda changes the weights below its factors"
    if config.measures_entries and config.base.protect != "none":
        needing = ", ".join(config.needing_entries) or "importance.entries"
        yield f"base.protect: weights in four bits have no importance entries, as {needing} needs"
    if config.resources.shard_model or config.training.compile:
        yield "model.quantization: cannot be combined with resources.shard_model or compile"


def _with_an_adapter(config: "Config") -> Iterator[str]:
    if config.adapter and config.adapter.fresh and "gate" in {i.kind for i in config.protect}:
        yield (
            "protect: with adapter.fresh only project and penalty can be used; a gate of "
            "earlier factors does not apply to fresh ones"
        )
    usable = {"project", "penalty"} if config.adapter and config.adapter.fresh else {"project"}
    if config.base.protect != "none":
        yield from _with_an_adapter_on_the_base(config, usable)
    if config.merge and config.adapter and not config.adapter.fresh:
        yield "merge: with an adapter needs adapter.fresh, which adds each task to the weights"
    if config.loss.reference == "previous" and config.adapter and not config.adapter.merge:
        yield ("loss.reference: the previous task's model needs adapter.merge, which writes it")
    if any(not item.needs_importance for item in config.protect):
        yield (
            "protect: a projection with directions=weights cannot be used with an adapter, which "
            "leaves the weights as they are"
        )
    if config.starts_from_corda and config.base.protect == "none":
        yield "base.protect: adapter.init=corda needs a text; choose base.protect=self"
    if config.starts_from_corda and config.protect:
        yield "protect: cannot be combined with adapter.init=corda"
    if config.starts_from_corda and config.resources.shard_model:
        yield "adapter.init: corda cannot be combined with resources.shard_model"
    if config.protect and (config.importance.past or config.importance.source == "solo"):
        yield (
            "importance: with an adapter neither past nor source solo can be used; they belong "
            "to other factors"
        )


def _with_an_adapter_on_the_base(config: "Config", usable: set[str]) -> Iterator[str]:
    if {item.kind for item in config.protect} - usable:
        yield (
            "base.protect: with an adapter only project can be used, with adapter.fresh penalty "
            "too; the importance of the base model's weights does not apply to factors"
        )
    random = any(isinstance(i, Project) and i.directions == "random" for i in config.protect)
    if random and config.adapter and not config.adapter.fresh:
        yield (
            "base.protect: with random directions needs adapter.fresh; an adapter for all tasks "
            "would lose what it learned in the base model's own directions"
        )


def _with_a_subspace(config: "Config") -> Iterator[str]:
    if config.adapter:
        yield "subspace: cannot be combined with adapter"
    if config.protect:
        yield (
            "subspace: cannot be combined with protect, whose importances belong to weights, "
            "not to the factors of their decomposition"
        )
    if config.resources.shard_model:
        yield "subspace: cannot be combined with resources.shard_model"
