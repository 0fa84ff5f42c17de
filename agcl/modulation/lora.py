"""Protection for LoRA: a new adapter's inputs or weights kept away from those of earlier tasks."""

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor

from agcl.importance import Importance
from agcl.model.adapter import FACTOR_A, PREFIX, WEIGHTS, factor_a
from agcl.modulation.projection import projected_part


@torch.no_grad()
def keep_away(peft_model: PeftModel, basis: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove input directions (`basis`, keyed by weight name) from every factor A, in place.

    Returns the basis keyed by the names of A. If the directions are also removed from all updates
    of A, B A x is zero for every x in their span.
    """
    factors = dict(peft_model.get_base_model().named_parameters())
    by_factor = {factor_a(name): tensor for name, tensor in basis.items()}
    for name, tensor in by_factor.items():
        factors[name].sub_(projected_part(factors[name], tensor.to(factors[name])))
    return by_factor


def directions(folders: Sequence[Path]) -> dict[str, Tensor]:
    """The factors A of saved adapters, stacked to (sum of ranks, in), keyed by weight name."""
    factors: dict[str, list[Tensor]] = {}
    for folder in folders:
        for key, tensor in load_file(folder / WEIGHTS).items():
            if key.endswith(FACTOR_A):
                name = key.removeprefix(PREFIX).removesuffix(FACTOR_A) + ".weight"
                factors.setdefault(name, []).append(tensor)
    return {name: torch.cat(parts) for name, parts in factors.items()}


def orthogonality(
    peft_model: PeftModel, earlier: Mapping[str, Tensor], *, strength: float
) -> Callable[[], Tensor]:
    """A function that computes the differentiable penalty λ Σ |A_earlier Aᵀ|, λ the `strength`.

    The sum is over layers and entries. Absolute values follow the authors' code (O-LoRA); eq. 8 of
    the paper squares the entries.
    """
    factors = dict(peft_model.get_base_model().named_parameters())
    current = {name: factors[factor_a(name)] for name in earlier}
    pairs = [(old.to(current[name]), current[name]) for name, old in earlier.items()]

    def penalty() -> Tensor:
        return strength * torch.stack([(old @ new.T).abs().sum() for old, new in pairs]).sum()

    return penalty


def product_penalty(
    peft_model: PeftModel, importances: Sequence[Importance], *, strength: float
) -> Callable[[], Tensor]:
    """A function that adds the gradient of ½ λ Σ F ΔW² to `.grad` and returns its value.

    ΔW is the update of a new adapter, scale · B A, λ the `strength`, and F the sum over importances
    (of the base model and past tasks) of the positive entries of the weights below it: elastic
    weight consolidation of the merged weight, anchored where the adapter starts. This is EWC-LoRA
    (Zheng et al. 2026, arXiv 2602.17559): Fisher information of the weight, not of the factors. The
    authors take it from batches' mean gradients, where ours is of single samples; and their code
    adds up the tasks' factors A and B, where we merge their products. Holds F in float32. Raises
    `ValueError` for a negative strength, without importances, and for one without entries or of
    other weights.
    """
    if not strength >= 0:
        raise ValueError(f"strength must be at least 0, not {strength}")
    if not importances or not all(each.entries for each in importances):
        raise ValueError("a penalty needs at least one importance, all with entries")
    layers = _layers(peft_model)
    if layers.keys() != set(importances[0].entries):
        raise ValueError("the importance is that of other weights than those with an adapter")
    fisher: dict[str, Tensor] = {}
    for name, layer in layers.items():
        factor = cast(Tensor, layer.lora_A["default"].weight)
        parts = (each.entries[name].to(factor).clamp(min=0) for each in importances)
        fisher[name] = reduce(torch.add, parts)
        if layer.fan_in_fan_out:
            fisher[name] = fisher[name].T

    @torch.no_grad()
    def penalise() -> Tensor:
        value = next(iter(fisher.values())).new_zeros(())
        for name, layer in layers.items():
            a, b = (cast(Tensor, f["default"].weight) for f in (layer.lora_A, layer.lora_B))
            scale = layer.scaling["default"]
            update = scale * b @ a
            gradient = strength * fisher[name] * update
            value += 0.5 * (gradient * update).sum()
            for factor, of_it in ((a, scale * b.T @ gradient), (b, scale * gradient @ a.T)):
                factor.grad = of_it if factor.grad is None else factor.grad.add_(of_it)
        return value

    return penalise


def _layers(peft_model: PeftModel) -> dict[str, LoraLayer]:
    """The layers with an adapter, keyed by their weight's name in the model below."""
    modules = peft_model.get_base_model().named_modules()
    return {f"{name}.weight": module for name, module in modules if isinstance(module, LoraLayer)}
