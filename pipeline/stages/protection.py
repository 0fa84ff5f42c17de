"""Training under protections of earlier tasks: gates, projections, penalties, frozen weights."""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from agcl.importance import Importance
from agcl.loss import Loss, summed_loss
from agcl.lrp import attributed_linears, stored_transposed
from agcl.model import subspace
from agcl.model.forward import activation_checkpointing, compiled
from agcl.modulation import (
    GatedAdamW,
    GatedSGD,
    GateOn,
    bases,
    gates,
    quadratic_penalty,
    random_bases,
    weight_bases,
)
from agcl.modulation.checks import check, sampled
from agcl.parallel import distributed, sharding
from agcl.tasks import Rows
from agcl.throughput import meter
from agcl.train import train_task
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.stages.attribute import past_moments
from pipeline.stages.context import ROUNDING, Context
from pipeline.stages.files import CHECKS, IMPORTANCE_FILE, named
from pipeline.storage.artifact import write_json


@dataclass
class Protection:
    """The config's `protect`, prepared for training: tensors are keyed by parameter name."""

    gate: dict[str, Tensor] | None = None
    on: GateOn = "update"
    basis: dict[str, Tensor] | None = None
    penalty: Callable[[], Tensor] | None = None
    only: set[str] | None = None
    """The only parameters to train; None trains all."""
    before: dict[str, Tensor] = field(default_factory=dict)
    """Samples of the gated and projected weights before training, on the CPU; rank 0 only."""

    def protected(self, model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
        """Copies of samples of the gated and projected weights on the CPU.

        Collective: only rank 0 gets them.
        """
        names, transposed = {*(self.gate or ()), *(self.basis or ())}, stored_transposed(model)
        weights = ((name, p) for name, p in model.named_parameters() if name in names)
        for name, weight in sharding.on_rank_zero(weights):
            yield name, sampled(weight, transposed=name in transposed).clone()

    def remember(self, model: PreTrainedModel) -> None:
        """Copy samples of the protected weights, to measure how they moved. Collective."""
        self.before = dict(self.protected(model))


def past_importances(inputs: Mapping[str, Path], device: torch.device) -> list[Importance]:
    """The importances of earlier tasks: artifacts of stages, or files of the user.

    Where only moments count, this is one importance, their sum. Artifacts were verified when they
    were fetched; files are verified here.
    """
    return [*past_moments(inputs, device)] or [
        Importance.load(path / IMPORTANCE_FILE, verify=False, device=device)
        if path.is_dir()
        else Importance.load(path, device=device)
        for path in named("importance/", inputs).values()
    ]


def base_importance(inputs: Mapping[str, Path], device: torch.device) -> Importance | None:
    """What the base model relied on before the first task, if that is protected."""
    if "base_importance" not in inputs:
        return None
    file = inputs["base_importance"] / IMPORTANCE_FILE
    return Importance.load(file, verify=False, device=device)


def warn_of_missing(
    config: Mapping[str, Any],
    past: Sequence[Importance],
    base: Importance | None,
    warn: Callable[[str], None],
) -> None:
    """Warn if a projection's energy is more than the importances stored for some input."""
    projections = [
        item for item in config["protect"] if item["kind"] == "project" and not _of_weights(item)
    ]
    asked = [("protect energy", item["energy"], past) for item in projections if past]
    if projections and base:
        asked.append(("base.energy", config["base_energy"], [base]))
    for name, energy, importances in asked:
        kept = min(importance.header.get("kept", 1.0) for importance in importances)
        if kept < energy:
            warn(
                f"{name} {energy:g}: for some inputs, the directions that importance.keep stored "
                f"hold only {kept:g}; all of them are protected; importance.keep=1 stores all"
            )


def protect(
    model: PreTrainedModel,
    past: list[Importance],
    config: Mapping[str, Any],
    base: Importance | None = None,
    known: Mapping[str, Tensor] | None = None,
) -> Protection:
    """Prepare the items of the config's `protect` from the importances of earlier tasks.

    The base model's importance counts as that of one more task. `known` are directions that a
    projection always protects. A projection with `directions: weights` computes its directions from
    the weights of `model` and uses no importance.
    """
    protection = Protection()
    every = [*([base] if base else []), *past]
    for item in config["protect"]:
        if _of_weights(item):
            if item["energy"]:
                protection.basis = _directions_of(model, item["energy"])
                if item["ungated"] == "freeze":
                    protection.only = set(protection.basis)
            continue
        if not (every or known):
            continue
        match item["kind"]:
            case "gate":
                protection.on = item["on"]
                protection.gate = gates(
                    every,
                    strength=item["strength"],
                    exponent=item["exponent"],
                    log_scale=item["log_scale"],
                )
            case "project":
                known = known or base_directions(base, config, model.device)
                protection.basis = basis_of(item, past, known, config["seed"], model.device)
            case "penalty":
                protection.penalty = quadratic_penalty(
                    dict(model.named_parameters()), every, strength=item["strength"]
                )
        # A projection's energy is that of tasks; the base model's directions are known.
        acts = known or (past and item["energy"]) if item["kind"] == "project" else item["strength"]
        if every and acts and item["ungated"] == "freeze":
            protection.only = set(every[0].weights)
    protection.remember(model)
    return protection


def _of_weights(item: Mapping[str, Any]) -> bool:
    return bool(item["kind"] == "project" and item["directions"] == "weights")


def _directions_of(model: PreTrainedModel, energy: float) -> dict[str, Tensor]:
    """The leading input directions of every attributed weight. Collective."""
    names = attributed_linears(model)
    weights = {name: p for name, p in model.named_parameters() if name in names}
    found = weight_bases(weights, energy=energy, transposed=stored_transposed(model))
    return distributed.of_rank_zero(found, model.device)


def base_directions(
    base: Importance | None, config: Mapping[str, Any], device: torch.device
) -> dict[str, Tensor]:
    """The base model's input directions to protect, per weight; none without its importance."""
    energy = config["base_energy"]
    return (
        distributed.of_rank_zero(bases([base], energy=energy, device=device), device)
        if base and energy
        else {}
    )


def basis_of(
    item: Mapping[str, Any],
    past: list[Importance],
    known: Mapping[str, Tensor],
    seed: int,
    device: torch.device,
) -> dict[str, Tensor]:
    """The input directions that a projection protects, per weight. Computed on `device`.

    `known` directions, and those of earlier tasks.
    """
    basis = dict(known)
    if past:
        basis |= bases(past, energy=item["energy"], known=known, device=device)
    if item["directions"] == "random":
        basis = random_bases(basis, seed=seed)
    return distributed.of_rank_zero(basis, device)


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
    if config.get("optimizer") == "sgd":
        optimizer = GatedSGD(list(trained.items()), momentum=config["momentum"], **options)
    else:
        rounding = config.get(ROUNDING, "nearest")
        options |= {"eight_bit": config.get("optimizer") == "adamw_8bit", "seed": config["seed"]}
        optimizer = GatedAdamW(trained.items(), rounding=rounding, **options)
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
            on="gradient" if config.get("optimizer") == "sgd" else protection.on,
            basis=protection.basis,
            steps=config["epochs"] * math.ceil(num_rows / config["batch_size"]),
            learning_rate=config["learning_rate"],
            transposed=transposed,
        )
        write_json(out_dir / CHECKS, found)
    distributed.meet()  # Rank 0 checks every weight alone; saving a sharded model is collective.
