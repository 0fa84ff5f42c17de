"""Checks of a config's inputs before any work: storage, devices, model, data, importance files."""

import os
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from agcl.errors import InputError
from agcl.files.pointers import check_pulled
from agcl.importance import check_file
from agcl.lrp import attributed_linears
from agcl.model import corda, models, subspace
from agcl.model.builtin import BUILTIN_LAYERS, builtin_model
from agcl.model.check import check_folder
from agcl.tasks import Row, encode
from transformers import PreTrainedModel
from transformers.utils import logging

from pipeline.config import hub
from pipeline.config.check_data import at_key, check_data
from pipeline.config.config import Config
from pipeline.config.method import Project
from pipeline.config.weights import loaded_dtype, rounds_8bit_to_nearest


def check_inputs(config: Config, *, weights: bool = True, devices: bool = True) -> None:
    """Raise `InputError`, one line that names the file, row or key, for the first bad input.

    With `weights` false, the model's folder may lack them. With `devices` false, this machine may
    lack the GPUs, and the packages that only computing with the model needs.
    """
    _check_storage(config.storage.root)
    if devices:
        _check_devices(config)
        if missing := missing_package(config):
            raise InputError(missing)
    _check_attention(config)
    _check_dtype(config, config.model.dtype)  # Before a download, if the files need not tell.
    _check_model(config, weights)
    _check_dtype(config, loaded_dtype(config.model))
    check_data(config)
    _check_layers(config)
    _check_factors(config)
    if config.importance.past:
        linears = attributed_linears(models.empty_model(config.model.folder))
        kinds = {item.kind for item in config.measured}
        for file in config.importance.past:
            with at_key("importance.past"):
                check_pulled(file)
            check_file(
                file,
                linears,
                entries=bool(kinds - {"project"}),
                moments="project" in kinds,
                measured_with=measured_with(config),
            )


def measured_with(config: Config) -> dict[str, Any]:
    """Settings that decide the units of importances, by their keys in an importance's header.

    Importances of one run are summed or compared, so that files of other runs must have the same.
    """
    settings: dict[str, Any] = {}
    for item in config.measured:
        if isinstance(item, Project):
            settings["unit_inputs"] = item.unit_inputs
        else:
            settings["estimator"] = config.importance.estimator
    return settings


def _check_storage(storage: Path) -> None:
    """Refuse a folder inside a Ray job's copy of the code, which is deleted with the job."""
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


def missing_package(config: Config) -> str | None:
    """What to say of a package that the model needs and that is not installed here."""
    model = config.model
    if model.attention == "flash_attention_2" and find_spec("flash_attn") is None:
        return (
            "model.attention: flash_attention_2 needs the package flash_attn, which is not "
            "installed here; or choose model.attention=sdpa"
        )
    if model.quantization and find_spec("bitsandbytes") is None:
        return (
            "model.quantization: nf4 needs bitsandbytes, which is not installed here: "
            "pip install 'agcl[quantization]'"
        )
    return None


def _check_attention(config: Config) -> None:
    if config.model.attention != "flash_attention_2":
        return
    of = {"training": config.training.precision, "evaluation": config.evaluation.precision}
    slow = [f"{key}.precision=bfloat16" for key, used in of.items() if used == "float32"]
    for lacking, remedy in (
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
    if rounds_8bit_to_nearest(config, dtype):
        raise InputError(
            "training.rounding: nearest cannot be combined with training.optimizer=adamw_8bit"
        )
    to_nearest = dtype == "bfloat16" and config.training.rounding == "nearest"
    if to_nearest and config.protect and not config.trains_factors:
        raise InputError(
            "training.rounding: nearest would undo the protection of bfloat16 weights, as method "
            f"{config.method} has it; choose stochastic, or model.dtype=float32"
        )


def _check_model(config: Config, weights: bool) -> None:
    chat = config.tasks.chat_template
    if not config.model.is_builtin:
        if config.model.on_hub:
            asked, commit = hub.parts(config.model.revision)
            hub.fetch(config.model.path, cast(str, commit), asked, weights=weights)
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
    with at_key("model.path"):
        tokenizer = check_folder(folder, weights=weights)
    if not chat:
        return
    try:
        encode(tokenizer, [Row("What is agcl?", " A package.")], chat=True)
    except InputError as error:
        raise InputError(f"tasks.chat_template: {error}") from None


def _check_factors(config: Config) -> None:
    """Refuse a model whose weights cannot be decomposed."""
    if not (config.subspace or config.starts_from_corda):
        return
    if config.model.is_builtin:
        model: PreTrainedModel = builtin_model(1, seed=0)  # Less than a million weights.
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
        number = BUILTIN_LAYERS
    else:
        number = int(models.empty_model(config.model.folder).config.num_hidden_layers)
    if max(layers) >= number:
        raise InputError(
            f"freeze.layers: no layer {max(layers)}; the model has layers 0 to {number - 1}"
        )
    freezes_others = any(item.ungated == "freeze" for item in config.protect)
    only_layers = config.freeze.ungated or config.trains_factors or freezes_others
    if only_layers and len(set(layers)) == number:
        raise InputError(
            "freeze.layers: all layers are frozen, and the other weights are too, so later tasks "
            "would train nothing"
        )
