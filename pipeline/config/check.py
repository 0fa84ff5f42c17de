"""What a user gives: where tasks and model come from, and checks of them before any work."""

import os
from pathlib import Path

import torch
from agcl.errors import InputError
from agcl.importance import check_file
from agcl.lrp import attributed_linears
from agcl.model import models
from agcl.scoring.scorers import scorer_named
from agcl.tasks import VALIDATION, check_names, check_rows

from pipeline.config.config import Config
from pipeline.config.sources import held_out_sources, open_task, selection, sources
from pipeline.storage.artifact import folder_name


def check_inputs(config: Config) -> None:
    """Check everything a user gave before any work: model, task names, every row, importances.

    Raises `InputError` of one line that names the file, row or key.
    """
    _check_storage(config.storage.root)
    _check_devices(config)
    if not is_builtin(config):
        models.check_folder(model_folder(config))
    _check_tasks(config)
    _check_chat_template(config)
    _check_text(config.evaluation.text)
    _check_layers(config)
    if config.importance.past:
        linears = attributed_linears(models.empty_model(model_folder(config)))
        kinds = {item.kind for item in config.protect}
        for file in config.importance.past:
            check_file(
                file.expanduser().absolute(),
                linears,
                entries=bool(kinds - {"project"}),
                moments="project" in kinds,
            )


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


def _check_storage(storage: Path) -> None:
    """A submitted job runs in a copy of the code on one node, which goes with the job."""
    if any(part.startswith("_ray_pkg_") for part in storage.parts):
        raise InputError(
            f"storage: {storage} goes with this Ray job; name a folder that all nodes see, by "
            "storage=FOLDER or in the cluster's environment by AGCL_STORAGE"
        )


def _check_devices(config: Config) -> None:
    wanted, found = config.resources.num_workers, torch.cuda.device_count()
    local = not os.environ.get("RAY_ADDRESS")
    if config.resources.gpus_per_worker and local and found < wanted:
        raise InputError(
            f"resources.gpus_per_worker: {wanted} workers need a GPU each, torch finds {found} here"
        )


def _check_tasks(config: Config) -> None:
    found = sources(config)
    check_names([source.name for source in found])
    tasks = [
        open_task(source.settings, source.files, selection(config, source)) for source in found
    ]
    for scorer in config.evaluation.scorers:
        scorer_named(scorer, "evaluation.scorers")
    named: dict[str, str] = {}
    for task in tasks:
        other = named.setdefault(folder_name(task.name), task.name)
        if other != task.name:
            raise InputError(
                f"task names {other!r} and {task.name!r} come to one folder, as odd characters "
                "become _ there; rename one"
            )
    taken = {source.name for source in held_out_sources(config)}
    for task in tasks:
        scorer_named(task.scorer, f"tasks.scorer (task {task.name})")
        if task.name in taken:
            raise InputError(f"task name {task.name!r} is taken by a held-out set")
        for split in task.splits:
            check_rows(task, split)
    common = set.intersection(*(set(task.scored) for task in tasks))
    if not common - {VALIDATION}:
        raise InputError("tasks.sequence: give every task a test file, or none of them")
    wanted = config.evaluation.set
    if wanted is not None and wanted not in common:
        raise InputError(
            f"evaluation.set: not every task has a set {wanted!r} (all have "
            f"{', '.join(sorted(common))})"
        )


def _check_chat_template(config: Config) -> None:
    if not config.tasks.chat_template:
        return
    if is_builtin(config):
        raise InputError("tasks.chat_template: the builtin model's tokenizer has none")
    folder = model_folder(config)
    if not models.load_tokenizer(folder).chat_template:
        raise InputError(f"tasks.chat_template: the tokenizer in {folder} has none")


def is_builtin(config: Config) -> bool:
    """Whether the model is the built-in one."""
    return config.model.path == models.BUILTIN


def model_folder(config: Config) -> Path:
    """The absolute folder of a model that is not built in."""
    return Path(config.model.path).expanduser().absolute()
