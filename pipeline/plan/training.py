"""The train stages of a plan: what each method trains with, and what it protects.

All have the same config keys, with None where a setting does not apply.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pipeline.config.config import Config
from pipeline.config.method import OF_MOMENTS, ROOT_OF_TASKS, Freeze, Project, ProtectSection
from pipeline.config.sources import sources
from pipeline.config.weights import loaded_dtype
from pipeline.plan.nodes import Inputs, adapter_on, loading
from pipeline.plan.stage import External, Stage
from pipeline.stages.merge import merge
from pipeline.stages.train import train


def training_settings(config: Config, index: int) -> dict[str, Any]:
    """Settings for training task `index` without protection; the same for all methods."""
    training = config.training
    # Factors are float32, and merging rounds the weights once, to nearest.
    rounds = loaded_dtype(config.model) == "bfloat16" and not config.trains_factors
    subspace, tasks = config.subspace, len(sources(config))
    return {
        **training.model_dump(),
        "momentum": training.momentum if training.optimizer == "sgd" else None,
        "rounding": training.rounding if rounds else None,
        "seed": config.seed * 1000 + index,
        "protect": [],
        "base_energy": None,
        "replay": 0.0,
        "freeze": None,
        "loss": None,
        "adapter": config.adapter and config.adapter.model_dump(),
        "subspace": subspace and subspace.preserved(index, tasks),
        **loading(config),
    }


def train_stage(
    config: Config,
    index: int,
    task: str,
    base: Stage | External,
    models: list[Stage],
    rows: Mapping[str, Stage],
    importances: Mapping[str, Stage],
    of_base: Stage | None = None,
    trained: Sequence[Stage] = (),
) -> Stage:
    """Train task `index` (1 to T). All methods share the stage while nothing is protected yet.

    `trained` are the train stages of the earlier tasks, whose adapters are used. `models` are the
    stages that made the models to continue from: merge stages, or the train stages themselves.
    """
    settings = training_settings(config, index)
    inputs: Inputs = {"model": models[-1] if models else base, "rows": rows[task]}
    if config.measured:
        inputs |= _protected_tasks(config, importances)
        inputs |= _protected_base(config, settings, of_base)
    has_past = any(role.startswith(("importance/", "past")) for role in inputs)
    settings["protect"] = [
        _settings_of(item, has_past=has_past)
        for item in config.protect
        if len(inputs) > 2 or not item.needs_importance
    ]
    if not config.loss.is_cross_entropy:
        settings["loss"] = config.loss.model_dump(exclude={"reference"})
    inputs |= _reference(config, base, models)
    earlier = list(rows)[: len(models)]
    if config.replay.fraction and models:
        settings["replay"] = config.replay.fraction
        inputs |= {f"replay/{name}": rows[name] for name in earlier}
    if config.freeze != Freeze() and models:
        settings["freeze"] = config.freeze.model_dump()
    if config.starts_from_corda and of_base and not models:
        inputs |= adapter_on(base, of_base)
    elif config.adapter and models:
        inputs |= _adapters(config, base, dict(zip(earlier, trained, strict=True)))
    return Stage(
        name=f"train/{index}-{task}",
        fn=train,
        config=settings,
        inputs=inputs,
        session="sequence",
        train=True,
    )


def merge_stage(
    config: Config, index: int, task: str, model: Stage, previous: Stage | External
) -> Stage:
    """Merge the model of task `index` with the one before it, or with the base model."""
    assert config.merge
    factor = config.merge.factor
    return Stage(
        name=f"merge/{index}-{task}",
        fn=merge,
        config={"factor": index**-0.5 if factor == ROOT_OF_TASKS else factor, **loading(config)},
        inputs={"model": model, "onto": previous},
        session="sequence",
        train=True,
    )


def past_files(config: Config, role: str) -> Inputs:
    """The user's importance files, by roles that begin with this one."""
    return {f"{role}{i}": External(file) for i, file in enumerate(config.importance.past)}


def _reference(config: Config, base: Stage | External, models: list[Stage]) -> Inputs:
    """The input of a train stage whose loss looks at a reference model."""
    if not config.loss.needs_reference:
        return {}
    previous = models and config.loss.reference == "previous"
    return {"reference": models[-1] if previous else base}


def _adapters(config: Config, base: Stage | External, models: Mapping[str, Stage]) -> Inputs:
    """The inputs of a train stage with an adapter that hold the adapters of earlier tasks."""
    assert config.adapter
    if not config.adapter.fresh:
        # The last stage's model already contains the adapter; resume it on the base instead.
        return adapter_on(base, list(models.values())[-1])
    if not config.adapter.orthogonal:
        return {}
    return {f"adapter/{name}": model for name, model in models.items()}


def _protected_tasks(config: Config, importances: Mapping[str, Stage]) -> Inputs:
    """The inputs of a train stage that protect earlier tasks: their sum, or each one's."""
    if config.sums_moments and importances:
        return {"past": list(importances.values())[-1]}
    each = {f"importance/{name}": stage for name, stage in importances.items()}
    return {**past_files(config, "importance/past-"), **each}


def _protected_base(config: Config, settings: dict[str, Any], of_base: Stage | None) -> Inputs:
    """The input of a train stage that protects the base model; its settings are added."""
    if not of_base:
        return {}
    settings["base_energy"] = config.base.energy
    return {"base_importance": of_base}


def _settings_of(item: ProtectSection, *, has_past: bool) -> dict[str, Any]:
    """An item of `protect`, with None for the settings that a projection does not use.

    If only the base model is protected, the settings for tasks are unused. Trials and controls
    that differ only in those share their first task.
    """
    settings = item.model_dump()
    if isinstance(item, Project) and not item.needs_importance:
        return settings | dict.fromkeys(OF_MOMENTS)
    if isinstance(item, Project) and not has_past:
        return settings | dict.fromkeys(("energy", *OF_MOMENTS))
    return settings


def solo_stages(
    config: Config, tasks: list[str], base: Stage | External, rows: Mapping[str, Stage]
) -> dict[str, Stage]:
    """Per task a model trained from the base on it alone, for `importance.source: solo`."""
    if not config.measures_solos:
        return {}
    alone = config.model_copy(update={"protect": ()})
    stages = {}
    for index, task in enumerate(tasks, start=1):
        stage = train_stage(alone, index, task, base, [], rows, {})
        stages[task] = replace(stage, name=f"solo/{index}-{task}", session=f"solo-{index}")
    return stages
