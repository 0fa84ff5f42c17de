"""Train: one task with the model of the last one, protected by the importances so far."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agcl import models
from agcl.importance import Importance
from agcl.modulation import GatedAdamW, bases, gates
from agcl.tasks import TRAIN, EncodedRows
from agcl.train import train_task
from transformers import PreTrainedModel

from pipeline.stages.context import Context

IMPORTANCE_FILE = "importance.safetensors"


def pretrain(
    config: Mapping[str, Any], inputs: Mapping[str, Path], out_dir: Path, context: Context
) -> None:
    """Train the built-in model from scratch on its generic facts."""
    tokenizer = models.load_tokenizer(inputs["tokenizer"])
    model = models.builtin_model(len(tokenizer), seed=config["seed"]).to(context.device)
    _fit(model, config, inputs["rows"], context, protection={})
    if context.is_first_worker:
        models.save(model, tokenizer, out_dir)
    context.hold_model(model, context.folder)


def train(
    config: Mapping[str, Any], inputs: Mapping[str, Path], out_dir: Path, context: Context
) -> None:
    """Train on `rows` from `model`; inputs named `importance/...` are protected."""
    past = [
        Importance.load(path / IMPORTANCE_FILE if path.is_dir() else path)
        for role, path in inputs.items()
        if role.startswith("importance/")
    ]
    model = context.take_model(inputs["model"])
    _freeze_ungated(model, past, config["protect"])
    _fit(model, config, inputs["rows"], context, protection(past, config["protect"]))
    if context.is_first_worker:
        models.save(model, models.load_tokenizer(inputs["model"]), out_dir)
    context.hold_model(model, context.folder)


def protection(past: list[Importance], items: list[dict[str, Any]]) -> dict[str, Any]:
    """Arguments of `GatedAdamW` for the items of the config's `protect`."""
    arguments: dict[str, Any] = {}
    for item in items if past else []:
        if item["kind"] == "gate":
            arguments["on"] = item["on"]
            arguments["gate"] = gates(
                past,
                strength=item["strength"],
                exponent=item["exponent"],
                log_scale=item["log_scale"],
            )
        else:
            arguments["basis"] = bases(past, energy=item["energy"])
    return arguments


def _freeze_ungated(
    model: PreTrainedModel, past: list[Importance], items: list[dict[str, Any]]
) -> None:
    """Freeze what no importance covers, where an active protection says so."""
    freeze = past and any(
        item["ungated"] == "freeze" and (item.get("strength") or item.get("energy"))
        for item in items
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not freeze or name in past[0].entries)


def _fit(
    model: PreTrainedModel,
    config: Mapping[str, Any],
    rows: Path,
    context: Context,
    protection: dict[str, Any],
) -> None:
    optimizer = GatedAdamW(
        [(name, p) for name, p in model.named_parameters() if p.requires_grad],
        lr=config["learning_rate"],
        weight_decay=config["weight_decay"],
        **protection,
    )
    train_task(
        model,
        EncodedRows(rows / f"{TRAIN}.arrow"),
        optimizer,
        epochs=config["epochs"],
        batch_size=config["batch_size"],
        micro_batch_size=config["micro_batch_size"],
        seed=config["seed"],
        precision=config["precision"],
        max_gradient_norm=config["max_gradient_norm"],
        log=context.log,
    )
