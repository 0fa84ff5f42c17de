"""Training under a protection: what is trained, the training, and whether it held."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from agcl.loss import Loss, summed_loss
from agcl.lrp import attributed_linears, stored_transposed
from agcl.model import subspace
from agcl.model.forward import activation_checkpointing, compiled
from agcl.modulation import GatedAdamW, GatedSGD
from agcl.modulation.checks import check, sampled
from agcl.parallel import distributed
from agcl.tasks import Rows
from agcl.throughput import meter
from agcl.train import train_task
from transformers import PreTrainedModel

from pipeline.stages.context import Context
from pipeline.stages.files import CHECKS
from pipeline.stages.protection import Protection
from pipeline.storage.artifact import write_json


def freeze(
    model: PreTrainedModel, protection: Protection, settings: Mapping[str, Any] | None
) -> None:
    """Set `requires_grad` on the parameters to train; with LoRA or OSFT these are factors only.

    A layer's index is the first number in a parameter's name.
    """
    layers: set[int] = set()
    attributed, of_subspace = set(attributed_linears(model)), subspace.factors(model)
    has_factors = bool(of_subspace) or any(".lora_" in name for name in attributed)
    attributed |= of_subspace
    if settings:
        half = range(model.config.num_hidden_layers // 2)
        layers = set(half if settings["layers"] == "bottom_half" else settings["layers"])
    for name, parameter in model.named_parameters():
        number = re.search(r"\.(\d+)\.", name)
        parameter.requires_grad_(
            (protection.only is None or name in protection.only)
            and not (number and int(number[1]) in layers)
            and not (settings and settings["ungated"] and name not in attributed)
            and (name in attributed or not has_factors)
        )


def fit(
    model: PreTrainedModel,
    config: Mapping[str, Any],
    rows: Rows,
    context: Context,
    protection: Protection,
    loss_of: Loss = summed_loss,
) -> None:
    """Train the parameters that have `requires_grad` on the rows."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gate, basis = (
        None if part is None else {name: part[name] for name in part if name in trained}
        for part in (protection.gate, protection.basis)
    )
    options: dict[str, Any] = {
        "lr": config["learning_rate"],
        "weight_decay": config["weight_decay"],
        "gate": gate,
        "on": protection.on,
        "basis": basis,
        "transposed": stored_transposed(model) if basis else (),
    }
    optimizer: torch.optim.Optimizer
    if config["optimizer"] == "sgd":
        optimizer = GatedSGD(list(trained.items()), momentum=config["momentum"], **options)
    else:
        options |= {"eight_bit": config["optimizer"] == "adamw_8bit", "seed": config["seed"]}
        options["rounding"] = config["rounding"] or "nearest"
        optimizer = GatedAdamW(trained.items(), **options)
    with (
        activation_checkpointing(model, config["activation_checkpointing"]),
        compiled(model, config["compile"]),
    ):
        train_task(
            model,
            rows,
            optimizer,
            epochs=config["epochs"],
            batch_size=config["batch_size"],
            micro_batch_size=config["micro_batch_size"],
            max_tokens=config["max_tokens"],
            seed=config["seed"],
            schedule=config["schedule"],
            warmup=config["warmup"],
            precision=config["precision"],
            packing=config["packing"],
            max_gradient_norm=config["max_gradient_norm"],
            loss_of=loss_of,
            penalise=protection.penalty,
            checkpoint=context.checkpoint,
            measure=meter(model),
            log=context.log,
        )


def write_checks(
    model: PreTrainedModel,
    protection: Protection,
    config: Mapping[str, Any],
    num_rows: int,
    out_dir: Path,
) -> None:
    """Measure whether gate and projection held, if there are any. Collective; rank 0 writes."""
    after = dict(protection.protected(model))
    if after:
        transposed = stored_transposed(model)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        gate = {
            name: sampled(each, transposed=name in transposed)
            for name, each in (protection.gate or {}).items()
            if name in trained  # Frozen weights do not move, whatever their gate.
        }
        found = check(
            protection.before,
            after,
            gate=gate or None,
            # SGD's steps are as unequal as gradients, whatever the gate.
            on="gradient" if config["optimizer"] == "sgd" else protection.on,
            basis=protection.basis,
            steps=config["epochs"] * math.ceil(num_rows / config["batch_size"]),
            learning_rate=config["learning_rate"],
            transposed=transposed,
        )
        write_json(out_dir / CHECKS, found)
    distributed.meet()  # Rank 0 checks every weight alone; saving a sharded model is collective.
