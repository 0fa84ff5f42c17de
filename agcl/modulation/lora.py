"""Protection for LoRA: keep a new adapter's input directions away from those of earlier tasks."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from agcl.model.adapter import WEIGHTS, factor_a
from agcl.modulation.projection import projected_part

_PREFIX, _FACTOR_A = "base_model.model.", ".lora_A.weight"


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
            if key.endswith(_FACTOR_A):
                name = key.removeprefix(_PREFIX).removesuffix(_FACTOR_A) + ".weight"
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
