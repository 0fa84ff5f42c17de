"""Protections of earlier tasks and of the base model: gates, projections, penalties."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from agcl.importance import Importance
from agcl.lrp import attributed_linears, stored_transposed
from agcl.modulation import GateOn, bases, gates, quadratic_penalty, random_bases, weight_bases
from agcl.modulation.checks import sampled
from agcl.parallel import distributed, sharding
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.stages.attribute import past_moments
from pipeline.stages.files import IMPORTANCE_FILE, named


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
