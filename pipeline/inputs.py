"""What a user gives: where tasks and model come from, and checks of them before any work."""

import os
from pathlib import Path
from typing import Any

import torch
from agcl import models
from agcl.errors import InputError
from agcl.importance import check_file
from agcl.lrp import attributed_linears
from agcl.tasks import Task, check_names, check_rows

from pipeline.config import Concept1KTasks, Config, FactsTasks
from pipeline.stages.prepare import open_task

BASE_TASK = "base"
"""Name of the built-in model's generic facts, scored beside the tasks."""


def check_inputs(config: Config) -> None:
    """Check everything a user gave before any work: model, task names, every row, importances.

    Raises `InputError` of one line that names the file, row or key.
    """
    _check_devices(config)
    if not is_builtin(config):
        models.check_folder(model_folder(config))
    _check_tasks(config, [open_task(source) for source in task_sources(config)])
    _check_text(config.evaluation.text)
    _check_layers(config)
    if config.importance.past:
        linears = attributed_linears(models.empty_model(model_folder(config)))
        for file in config.importance.past:
            check_file(file.expanduser().absolute(), linears)


def _check_text(file: Path | None) -> None:
    if file is None:
        return
    try:
        with file.expanduser().open(encoding="utf-8") as text:
            if not text.read(1000).strip():
                raise InputError(f"evaluation.text: {file} is empty")
    except OSError as error:
        raise InputError(f"evaluation.text: {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"evaluation.text: {file} is not UTF-8 text") from None


def _check_layers(config: Config) -> None:
    """The layers to freeze are layers of the model."""
    layers = config.freeze.layers
    if layers == "bottom_half" or not layers:
        return
    if is_builtin(config):
        number = models.BUILTIN_LAYERS
    else:
        number = int(models.empty_model(model_folder(config)).config.num_hidden_layers)
    if max(layers) >= number:
        raise InputError(
            f"freeze.layers: no layer {max(layers)}; the model has layers 0 to {number - 1}"
        )


def _check_devices(config: Config) -> None:
    wanted, found = config.resources.num_workers, torch.cuda.device_count()
    local = not os.environ.get("RAY_ADDRESS")
    if config.resources.use_gpu and local and found < wanted:
        raise InputError(
            f"resources.use_gpu: {wanted} workers need a GPU each, torch finds {found} here"
        )


def _check_tasks(config: Config, tasks: list[Task]) -> None:
    check_names([task.name for task in tasks])
    for task in tasks:
        if task.name in held_out_sources(config):
            raise InputError(f"task name {task.name!r} is taken by a held-out set")
        for split in task.splits:
            check_rows(task, split)
    common = set.intersection(*(set(task.scored) for task in tasks))
    if not common:
        raise InputError("tasks.sequence: give every task a test file, or none of them")
    wanted = config.evaluation.set
    if wanted is not None and wanted not in common:
        raise InputError(
            f"evaluation.set: not every task has a set {wanted!r} (all have "
            f"{', '.join(sorted(common))})"
        )


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


def held_out_sources(config: Config) -> dict[str, dict[str, Any]]:
    """Skills of the base model that are scored beside the tasks: the built-in generic facts."""
    if not is_builtin(config):
        return {}
    seed = config.tasks.seed if isinstance(config.tasks, FactsTasks) else 0
    entities = config.model.pretraining.entities
    return {BASE_TASK: {"format": "facts-base", "entities": entities, "seed": seed}}


def is_builtin(config: Config) -> bool:
    """Whether the model is the built-in one."""
    return config.model.path == models.BUILTIN


def model_folder(config: Config) -> Path:
    """The absolute folder of a model that is not built in."""
    return Path(config.model.path).expanduser().absolute()
