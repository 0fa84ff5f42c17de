"""Checks of a config's inputs before any work: model, tasks, every row, importance files."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from agcl.errors import InputError
from agcl.files.pointers import check_pulled
from agcl.importance import check_file
from agcl.lrp import attributed_linears
from agcl.model import corda, models, subspace
from agcl.scoring import probes
from agcl.scoring.scorers import scorer_named
from agcl.tasks import VALIDATION, Row, Task, check_names, check_rows, encode
from agcl.tasks.messages import kinds_of_turns
from transformers import PreTrainedModel
from transformers.utils import logging

from pipeline.config import hub
from pipeline.config.config import Config
from pipeline.config.sources import (
    base_rows,
    held_out_sources,
    open_task,
    selection,
    sources,
    text_files,
)
from pipeline.config.task_section import Source
from pipeline.config.weights import loaded_dtype
from pipeline.storage.artifact import folder_name

_CHECKED: set[str] = set()
"""The sources whose rows were checked by this process."""


def check_inputs(config: Config, *, weights: bool = True) -> None:
    """Raise `InputError`, one line that names the file, row or key, for the first bad input.

    With `weights` false, the model's folder may lack them.
    """
    _check_storage(config.storage.root)
    _check_devices(config)
    _check_attention(config)
    _check_quantization(config)
    _check_dtype(config, config.model.dtype)  # Before a download, if the files need not tell.
    _check_model(config, weights)
    _check_dtype(config, loaded_dtype(config.model))
    tasks = _open_tasks(config)
    for task in tasks:
        scorer_named(task.scorer, f"tasks.scorer (task {task.name})")
    _check_evaluation(config, tasks)
    _check_layers(config)
    _check_factors(config)
    _check_base(config)
    if config.importance.past:
        linears = attributed_linears(models.empty_model(config.model.folder))
        kinds = {item.kind for item in config.measured}
        for file in config.importance.past:
            with _named("importance.past"):
                check_pulled(file)
            check_file(
                file,
                linears,
                entries=bool(kinds - {"project"}),
                moments="project" in kinds,
            )


@contextmanager
def _named(key: str) -> Iterator[None]:
    """Put the config key before the message of an `InputError`."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{key}: {error}") from None


def _check_storage(storage: Path) -> None:
    """A submitted job runs in a copy of the code on one node, which is deleted with the job."""
    if any(part.startswith("_ray_pkg_") for part in storage.parts):
        raise InputError(
            f"storage: {storage} is deleted with this Ray job; name a folder that all nodes share, "
            "with storage=FOLDER or the environment variable AGCL_STORAGE of the cluster"
        )


def _check_devices(config: Config) -> None:
    wanted, found = config.resources.num_workers, torch.cuda.device_count()
    local = not os.environ.get("RAY_ADDRESS")
    if config.resources.gpus_per_worker and local and found < wanted:
        raise InputError(
            f"resources.gpus_per_worker: {wanted} workers need a GPU each, torch finds {found} here"
        )


def _check_quantization(config: Config) -> None:
    if config.model.quantization and find_spec("bitsandbytes") is None:
        raise InputError(
            "model.quantization: nf4 needs bitsandbytes, which is not installed here: "
            "pip install 'agcl[quantization]'"
        )


def _check_attention(config: Config) -> None:
    if config.model.attention != "flash_attention_2":
        return
    of = {"training": config.training.precision, "evaluation": config.evaluation.precision}
    slow = [f"{key}.precision=bfloat16" for key, used in of.items() if used == "float32"]
    for lacking, remedy in (
        (find_spec("flash_attn") is None, "the package flash_attn, which is not installed here"),
        (not config.resources.gpus_per_worker, "a GPU (resources.gpus_per_worker=1)"),
        (config.model.dtype == "float32" and slow, f"half precision ({' and '.join(slow)})"),
    ):
        if lacking:
            raise InputError(
                f"model.attention: flash_attention_2 needs {remedy}; or choose model.attention=sdpa"
            )


def _check_dtype(config: Config, dtype: str) -> None:
    """Refuse weights too coarse for what the config would do with them."""
    if dtype == "float16":
        raise InputError(
            f"model.dtype: auto is float16 for {config.model.path}, in which AdamW cannot train; "
            "choose bfloat16 or float32"
        )
    if dtype == "bfloat16" and config.training.optimizer == "sgd":
        raise InputError("training.optimizer: sgd needs float32 weights; set model.dtype=float32")
    if dtype == "bfloat16" and config.starts_from_corda:
        raise InputError("adapter.init: corda needs weights in float32, model.dtype=float32")
    to_nearest = dtype == "bfloat16" and config.training.rounding == "nearest"
    if to_nearest and config.training.optimizer == "adamw_8bit" and not config.adapter:
        raise InputError(
            "training.rounding: nearest cannot be combined with training.optimizer=adamw_8bit"
        )
    if to_nearest and config.protect and not config.adapter:
        raise InputError(
            "training.rounding: nearest would undo the protection of bfloat16 weights, as method "
            f"{config.method} has it; choose stochastic, or model.dtype=float32"
        )


def _check_model(config: Config, weights: bool) -> None:
    chat = config.tasks.chat_template
    if not config.model.is_builtin:
        if config.model.on_hub:
            asked, commit = hub.parts(config.model.revision)
            hub.fetch(config.model.path, cast(str, commit), asked)
        folder = config.model.folder
        status = (
            {f.name: f.stat() for f in folder.iterdir() if f.is_file()} if folder.is_dir() else {}
        )
        files = ((name, each.st_size, each.st_mtime_ns) for name, each in status.items())
        _check_model_as_of(folder, frozenset(files), chat, weights)
    elif chat:
        raise InputError("tasks.chat_template: the builtin model's tokenizer has no chat template")


@cache
def _check_model_as_of(
    folder: Path, files: frozenset[tuple[str, int, int]], chat: bool, weights: bool
) -> None:
    """Cached until a file changes: a search checks its base model in every trial."""
    logging.disable_progress_bar()
    with _named("model.path"):
        tokenizer = models.check_folder(folder, weights=weights)
    if not chat:
        return
    try:
        encode(tokenizer, [Row("What is agcl?", " A package.")], chat=True)
    except InputError as error:
        raise InputError(f"tasks.chat_template: {error}") from None


def _open_tasks(config: Config) -> list[Task]:
    """The tasks of the sequence, with names that can be used for folders."""
    found = sources(config)
    names = [source.name for source in found]
    check_names(names)
    taken = {source.name for source in held_out_sources(config)}
    by_folder: dict[str, str] = {}
    for name in names:
        if name in taken:
            raise InputError(f"task name {name!r} is taken by a held-out set")
        other = by_folder.setdefault(folder_name(name), name)
        if other != name:
            raise InputError(
                f"task names {other!r} and {name!r} give the same folder name, in which unusual "
                "characters become _; rename one"
            )
    return [_open_task(config, source, "tasks") for source in found]


def _open_task(config: Config, source: Source, section: str) -> Task:
    """A task whose rows were checked."""
    for path in source.files.values():
        with _named(f"{section}.sequence (task {source.name})"):
            check_pulled(path)
    chosen = selection(config, source)
    task = open_task(source.settings, source.files, chosen)
    stamps = {role: (str(path), _stamp(path)) for role, path in source.files.items()}
    by_template = [config.tasks.chat_template, config.model.path]
    key = json.dumps([source.settings, chosen, stamps, by_template], sort_keys=True)
    _check_rows_once(config, task, key)
    return task


def _check_rows_once(config: Config, task: Task, key: str) -> None:
    """Check every row of a task, once per process: the runs of a comparison have the same tasks."""
    if key not in _CHECKED:
        check = _conversation_check(config)
        for split in task.splits:
            check_rows(task, split, check)
        _CHECKED.add(key)


def _conversation_check(config: Config) -> Callable[[Row], None]:
    """A check whether the chat template renders a row's kinds of turns.

    Once per kind: rendering every row would take as long as preparing them does.
    """
    seen: set[str] = set()

    def check(row: Row) -> None:
        if row.conversation and not seen.issuperset(kinds := kinds_of_turns(row.conversation)):
            seen.update(kinds)
            if config.model.is_builtin:
                raise InputError(
                    f"{row.conversation.place}: messages need a chat template, which the builtin "
                    "model's tokenizer does not have; set model.path"
                )
            encode(models.load_tokenizer(config.model.folder), [row])

    return check


def _stamp(path: Path) -> list[Any]:
    """Size and modification time of a file, or of a folder's files by name."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]


def _check_evaluation(config: Config, tasks: list[Task]) -> None:
    for scorer in config.evaluation.scorers:
        scorer_named(scorer, "evaluation.scorers")
    common = set.intersection(*(set(task.scored) for task in tasks))
    if not common - {VALIDATION}:
        raise InputError("tasks.sequence: either every task needs a test file, or none")
    wanted = config.evaluation.set
    if wanted is not None and wanted not in common:
        raise InputError(
            f"evaluation.set: not every task has a set {wanted!r} (all have "
            f"{', '.join(sorted(common))})"
        )
    for probe in config.evaluation.probes:
        with _named("evaluation.probes"):
            check_pulled(probe)
            probes.read(probe)
    if (file := config.evaluation.text) and not _has_text(file, "evaluation.text", whole=True):
        raise InputError(f"evaluation.text: {file} is empty")


def _has_text(file: Path, key: str, *, whole: bool = False) -> bool:
    """Whether a file holds more than white space. Reads up to the first text, or the `whole`.

    Raises `InputError` if it cannot be read as UTF-8 so far.
    """
    with _named(key):
        check_pulled(file)
    try:
        with file.open(encoding="utf-8") as text:
            found = any(part.strip() for part in iter(partial(text.read, 1000), ""))
            while whole and text.read(2**20):
                pass
            return found
    except OSError as error:
        raise InputError(f"{key}: {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{key}: {file} is not UTF-8 text") from None


def _check_base(config: Config) -> None:
    if config.base.protect == "text" and config.base.text:
        with _named("base.text"):
            files = text_files(config.base.text)
        with_text = [_has_text(file, "base.text") for file in files]
        if not any(with_text):
            raise InputError(f"base.text: no text in {config.base.text}")
    if given := base_rows(config):
        for source in sources(given):
            _open_task(given, source, "base.rows")


def _check_factors(config: Config) -> None:
    """Refuse a model whose weights cannot be decomposed."""
    if not (config.subspace or config.starts_from_corda):
        return
    if config.model.is_builtin:
        model: PreTrainedModel = models.builtin_model(1, seed=0)  # Less than a million weights.
    else:
        model = models.empty_model(config.model.folder)
    if config.subspace:
        subspace.check(model)
    if config.adapter and config.starts_from_corda:
        corda.check_rank(model, config.adapter.rank)


def _check_layers(config: Config) -> None:
    layers = config.freeze.layers
    if layers == "bottom_half" or not layers:
        return
    if config.model.is_builtin:
        number = models.BUILTIN_LAYERS
    else:
        number = int(models.empty_model(config.model.folder).config.num_hidden_layers)
    if max(layers) >= number:
        raise InputError(
            f"freeze.layers: no layer {max(layers)}; the model has layers 0 to {number - 1}"
        )
