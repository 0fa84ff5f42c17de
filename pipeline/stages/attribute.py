"""Attribute: measure which weights and inputs produced the right answers of a task."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from agcl.attribution import attribute as attribute_batches
from agcl.attribution.attribute import NoCorrectAnswer, Split
from agcl.importance import Importance, magnitude, permuted, random, running_sum
from agcl.lrp import attributed_linears
from agcl.parallel import distributed
from agcl.tasks import TRAIN, EncodedRows, Rows, sample
from agcl.tasks.batches import collate, in_order
from torch.utils.data import ConcatDataset
from transformers import PreTrainedModel

from pipeline.stages.context import Context
from pipeline.stages.files import IMPORTANCE_FILE, LOG_FILE, PAST_FILE, named, rows_file

_WORSE = 1.05
"""A loss that rose by more than noise."""


def attribute(
    config: Mapping[str, Any], inputs: Mapping[str, Path], out_dir: Path, context: Context
) -> None:
    """Write the importance of `model` on the training rows of `rows`, or of all `rows/...`.

    With the input `adapter`, attribute the adapter's factors. With the input `past` or inputs
    `past/...`, also write the sum of their moments and this task's. If the model answers no row
    correctly, attribute all rows and warn, or raise `ValueError` if its training loss rose.
    """
    folders = [path for role, path in inputs.items() if role.startswith("rows")]
    logged: dict[str, int] = {}
    with context.borrowed_model(inputs, config) as model:
        for parameter in model.parameters():
            # An adapter's factors are float32 on any base. Without the cast, each would read its
            # own copy of its input, and the copies would count as different inputs.
            if parameter.is_floating_point() and parameter.dtype != model.dtype:
                parameter.data = parameter.data.to(model.dtype)
        try:
            importance = _importance(model, config, folders, context, logged)
        except NoCorrectAnswer as error:
            reason = str(error).partition(";")[0]
            _check_learned(reason, inputs.get("adapter", inputs["model"]) / LOG_FILE)
            if context.is_rank_zero:
                context.warn(f"{reason}, so the importance is measured on all of them")
            every = {**config, "correct_only": False}
            importance = _importance(model, every, folders, context, logged)
    if context.is_rank_zero:  # Which alone has all layers' entries.
        importance.check_finite()
        if importance.is_zero():
            raise ValueError("every importance is zero: no relevance reached any weight")
        importance.save(out_dir / IMPORTANCE_FILE)
        if earlier := past_moments(inputs, context.device):
            summed = [*earlier, importance]
            both = running_sum(summed, keep=config["keep"], device=context.device)
            both.save(out_dir / PAST_FILE)


def past_moments(inputs: Mapping[str, Path], device: torch.device) -> list[Importance]:
    """The summed moments of earlier tasks, in the input `past`, and files in inputs `past/...`.

    Artifacts were verified when they were fetched; files of the user are verified here.
    """
    files = named("past/", inputs).values()
    found = [Importance.load(file, device=device) for file in files]
    if folder := inputs.get("past"):
        file = next(f for f in (folder / PAST_FILE, folder / IMPORTANCE_FILE) if f.is_file())
        found.append(Importance.load(file, verify=False, device=device))
    return found


def _check_learned(reason: str, log: Path) -> None:
    """Raise `ValueError` if a model that answers nothing correctly got worse while it trained."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    losses = [loss for line in lines if (loss := json.loads(line).get("loss")) is not None]
    part = max(1, len(losses) // 3)  # Single batches differ.
    first, last = (fmean(each or [0.0]) for each in (losses[:part], losses[-part:]))
    if last > first * _WORSE:
        raise ValueError(
            f"{reason}; its training loss rose from {first:.3g} to {last:.3g}: lower "
            "training.learning_rate"
        )


def _importance(
    model: PreTrainedModel,
    config: Mapping[str, Any],
    folders: Sequence[Path],
    context: Context,
    logged: dict[str, int],
) -> Importance:
    """Attribute the rows of prepared tasks, then apply the control that the config asks for.

    With `split` by layers, ranks other than 0 get no entries.
    `logged["rows"]` is the number of rows up to which progress was already logged.
    """
    parts: list[Any] = [EncodedRows(folder / rows_file(TRAIN)) for folder in folders]
    rows: Rows = ConcatDataset(parts)
    chosen = sample(len(rows), config["samples"] or len(rows), seed=config["seed"])
    batches = in_order(len(chosen), config["batch_size"])
    split: Split = "layers" if context.shard_model else config["split"]
    mine = batches if split == "layers" else batches[distributed.rank() :: distributed.world_size()]
    estimator = config["estimator"]

    def log(done: int) -> None:
        done = min(done, len(chosen))
        # A second pass, on all rows, is no second curve.
        if done > logged.get("rows", 0):
            logged["rows"] = done
            context.log({"rows": done, "of_rows": len(chosen)}, done)

    importance = attribute_batches(
        model,
        (collate([rows[chosen[i]] for i in indices]) for indices in mine),
        # `magnitude` and `random` estimate nothing from the rows; they only need the moments.
        estimator="das" if estimator in ("magnitude", "random") else estimator,
        top_k=config["top_k"],
        rules=config["rules"],
        moments=config["moments"],
        unit_inputs=config["unit_inputs"],
        entries=config["entries"],
        correct_only=config["correct_only"],
        split=split,
        running_values=config["running_values"],
        precision=config["precision"],
        keep=config["keep"],
        everywhere=False,
        log=log,
    )
    if estimator == "magnitude":
        importance = magnitude(importance, attributed_linears(model))
    if estimator == "random":
        importance = random(importance, seed=config["seed"])
    return permuted(importance, seed=config["seed"]) if config["permuted"] else importance
