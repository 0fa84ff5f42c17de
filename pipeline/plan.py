"""From a config to the list of its stages, readable top to bottom."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from agcl import models
from agcl.errors import InputError
from agcl.importance import check_file
from agcl.lrp import attributed_linears
from agcl.tasks import check_names, check_rows

from pipeline.config import Concept1KTasks, Config, FactsTasks, Project
from pipeline.dag import External, Stage, Work
from pipeline.stages.attribute import attribute
from pipeline.stages.evaluate import evaluate
from pipeline.stages.prepare import FILE_KEYS, make_tokenizer, open_task, prepare
from pipeline.stages.report import report
from pipeline.stages.train import pretrain, train

BASE_TASK = "base"
_TOKENIZER_FILES = ("token*", "special_tokens*", "added_tokens*", "vocab*", "merges*", "*.jinja")
_MODEL_FILES = ("config.json", "generation_config.json", "*.safetensors*", *_TOKENIZER_FILES)


@dataclass(frozen=True)
class Plan:
    """What a config asks for."""

    stages: tuple[Stage, ...]
    """In dependency order; the last one is the report."""
    tasks: tuple[str, ...]
    final_model: str
    """Name of the stage whose artifact is the final model."""


@dataclass(frozen=True)
class Run:
    """A config with its folder and its stages, resolved to artifacts."""

    config: Config
    folder: Path
    plan: Plan
    works: Mapping[str, Work]
    """By stage name."""


def plan(config: Config) -> Plan:
    """The stages of one method over one sequence. Reads no data and runs nothing."""
    sources = task_sources(config)
    held_out = _held_out_sources(config)
    tasks = [open_task(source).name for source in sources]
    tokenizer = _tokenizer(config)
    rows = {
        task: _prepare(config, task, source, tokenizer)
        for task, source in [*zip(tasks, sources, strict=True), *held_out.items()]
    }
    base = _base_model(config, tokenizer, rows)
    first_session = "base" if _builtin(config) else "sequence"
    scores = [_evaluate(config, "0-base", base, rows, first_session)]
    models_after: list[Stage] = []
    importances: dict[str, Stage] = {}
    solos = _solos(config, tasks, base, rows)
    chain: list[Stage] = []
    model: Stage | External = base
    for index, task in enumerate(tasks, start=1):
        model = _train(config, index, task, model, rows[task], importances)
        models_after.append(model)
        chain.append(model)
        if config.protect:
            measured = solos[task] if solos else model
            importances[task] = _attribute(config, index, task, measured, rows[task])
            chain.append(importances[task])
        scores.append(_evaluate(config, f"{index}-{task}", model, rows, "sequence"))
        chain.append(scores[-1])
    final = _report(config, tasks, list(held_out), scores, importances)
    builtin = [tokenizer, base] if _builtin(config) else []
    stages = [builtin[:1], rows.values(), builtin[1:], scores[:1], solos.values(), chain, [final]]
    return Plan(
        stages=tuple(s for group in stages for s in group if isinstance(s, Stage)),
        tasks=tuple(tasks),
        final_model=models_after[-1].name,
    )


def check_inputs(config: Config) -> None:
    """Check everything a user gave before any work: model, task names, every row, importances.

    Raises `InputError` of one line that names the file, row or key.
    """
    if config.resources.use_gpu and not (
        os.environ.get("RAY_ADDRESS") or torch.cuda.device_count() >= config.resources.num_workers
    ):
        raise InputError(
            f"resources.use_gpu: {config.resources.num_workers} workers need a GPU each, torch "
            f"finds {torch.cuda.device_count()} on this machine"
        )
    if not _builtin(config):
        models.check_folder(_model_folder(config))
    tasks = [open_task(source) for source in task_sources(config)]
    check_names([task.name for task in tasks])
    for task in tasks:
        if task.name in _held_out_sources(config):
            raise InputError(f"task name {task.name!r} is taken by a held-out set")
        for split in task.splits:
            check_rows(task, split)
    wanted = config.evaluation.set
    for task in tasks:
        if wanted is not None and wanted not in task.scored:
            raise InputError(
                f"evaluation.set: task {task.name} has no set {wanted!r} "
                f"(it has {', '.join(task.scored)})"
            )
    if config.importance.past:
        linears = attributed_linears(models.empty_model(_model_folder(config)))
        for file in config.importance.past:
            check_file(file.expanduser().absolute(), linears)


def task_sources(config: Config) -> list[dict[str, Any]]:
    """Per task the JSON from which `open_task` makes it; what its prepared rows depend on."""
    tasks = config.tasks
    if isinstance(tasks, FactsTasks):
        return [_facts_source(config, tasks, index) for index in range(tasks.count)]
    if isinstance(tasks, Concept1KTasks):
        file = tasks.path.expanduser().absolute() / "dataset.txt"
        return [
            {
                "format": "concept1k",
                "file": str(file),
                "index": index,
                "concepts_per_task": tasks.concepts_per_task,
            }
            for index in range(tasks.count)
        ]
    return [
        {
            "format": "jsonl",
            "name": task.name,
            "train": str(task.train.expanduser().absolute()),
            "test": str(task.test.expanduser().absolute()) if task.test else None,
            "prompt_key": tasks.prompt_key,
            "answer_key": tasks.answer_key,
        }
        for task in tasks.sequence
    ]


def _facts_source(config: Config, tasks: FactsTasks, index: int) -> dict[str, Any]:
    return {
        "format": "facts",
        "index": index,
        "entities": tasks.entities,
        "base_entities": config.model.pretraining.entities,
        "seed": tasks.seed,
    }


def _held_out_sources(config: Config) -> dict[str, dict[str, Any]]:
    """Skills of the base model that are scored beside the tasks: the built-in generic facts."""
    if not _builtin(config):
        return {}
    seed = config.tasks.seed if isinstance(config.tasks, FactsTasks) else 0
    entities = config.model.pretraining.entities
    return {BASE_TASK: {"format": "facts-base", "entities": entities, "seed": seed}}


def _files_of(source: Mapping[str, Any]) -> dict[str, External]:
    """The keys of a task's source that are files: inputs, so that contents count, not paths."""
    return {k: External(Path(source[k])) for k in FILE_KEYS if source.get(k)}


def _builtin(config: Config) -> bool:
    return config.model.path == models.BUILTIN


def _model_folder(config: Config) -> Path:
    return Path(config.model.path).expanduser().absolute()


def _tokenizer(config: Config) -> Stage | External:
    if not _builtin(config):
        return External(_model_folder(config), _TOKENIZER_FILES)
    return Stage(
        name="tokenizer",
        fn=make_tokenizer,
        config={"task": _held_out_sources(config)[BASE_TASK]},
        session="prepare",
    )


def _prepare(
    config: Config, task: str, source: dict[str, Any], tokenizer: Stage | External
) -> Stage:
    return Stage(
        name=f"prepare/{task}",
        fn=prepare,
        config={
            "task": {k: v for k, v in source.items() if k not in FILE_KEYS},
            "max_length": config.tasks.max_length,
        },
        inputs={"tokenizer": tokenizer, **_files_of(source)},
        session="prepare",
    )


def _base_model(
    config: Config, tokenizer: Stage | External, rows: Mapping[str, Stage]
) -> Stage | External:
    if not _builtin(config):
        return External(_model_folder(config), _MODEL_FILES)
    settings = config.model.pretraining
    return Stage(
        name="pretrain",
        fn=pretrain,
        config={
            **config.training.model_dump(),
            "learning_rate": settings.learning_rate,
            "epochs": settings.epochs,
            "batch_size": settings.batch_size,
            "micro_batch_size": settings.batch_size,
            "seed": config.seed,
        },
        inputs={"tokenizer": tokenizer, "rows": rows[BASE_TASK]},
        session="base",
        train=True,
    )


def _train(
    config: Config,
    index: int,
    task: str,
    model: Stage | External,
    rows: Stage,
    importances: Mapping[str, Stage],
) -> Stage:
    """Task `index` (1 to T). With nothing to protect yet, all methods share the stage."""
    past: dict[str, Stage | External] = {}
    if config.protect:
        for i, file in enumerate(config.importance.past):
            past[f"importance/past-{i}"] = External(file.expanduser().absolute())
        past |= {f"importance/{name}": stage for name, stage in importances.items()}
    protect = [item.model_dump() for item in config.protect] if past else []
    return Stage(
        name=f"train/{index}-{task}",
        fn=train,
        config={
            **config.training.model_dump(),
            "seed": config.seed * 1000 + index,
            "protect": protect,
        },
        inputs={"model": model, "rows": rows, **past},
        session="sequence",
        train=True,
    )


def _solos(
    config: Config, tasks: list[str], base: Stage | External, rows: Mapping[str, Stage]
) -> dict[str, Stage]:
    """Per task a model trained from the base on it alone, for `importance.source: solo`."""
    if not config.protect or config.importance.source == "sequential":
        return {}
    alone = config.model_copy(update={"protect": ()})
    stages = {}
    for index, task in enumerate(tasks, start=1):
        stage = _train(alone, index, task, base, rows[task], {})
        stages[task] = _renamed(stage, f"solo/{index}-{task}", f"solo-{index}")
    return stages


def _renamed(stage: Stage, name: str, session: str) -> Stage:
    return Stage(name, stage.fn, stage.config, stage.inputs, session, stage.train)


def _attribute(config: Config, index: int, task: str, model: Stage, rows: Stage) -> Stage:
    settings = config.importance
    weighting = next((p.weighting for p in config.protect if isinstance(p, Project)), None)
    return Stage(
        name=f"attribute/{index}-{task}",
        fn=attribute,
        config={
            "estimator": settings.estimator,
            "rules": settings.rules,
            "top_k": settings.top_k,
            "samples": settings.samples,
            "correct_only": settings.correct_only,
            "batch_size": settings.batch_size,
            "moments": weighting,
            "seed": config.seed * 1000 + index,
        },
        inputs={"model": model, "rows": rows},
        session=model.session,
        train=True,
    )


def _evaluate(
    config: Config, name: str, model: Stage | External, rows: Mapping[str, Stage], session: str
) -> Stage:
    return Stage(
        name=f"evaluate/{name}",
        fn=evaluate,
        config={
            "batch_size": config.evaluation.batch_size,
            "precision": config.evaluation.precision,
        },
        inputs={"model": model, **{f"rows/{task}": stage for task, stage in rows.items()}},
        session=session,
        train=True,
    )


def _report(
    config: Config,
    tasks: list[str],
    held_out: list[str],
    scores: list[Stage],
    importances: Mapping[str, Stage],
) -> Stage:
    return Stage(
        name="report",
        fn=report,
        config={
            "method": config.method,
            "seed": config.seed,
            "tasks": tasks,
            "held_out": held_out,
            "evaluation_set": config.evaluation.set,
        },
        inputs={
            **{f"scores/{i}": stage for i, stage in enumerate(scores)},
            **{f"importance/{task}": stage for task, stage in importances.items()},
        },
        session="report",
    )
