"""What LoRA adapters add to protection: fresh factors kept away from what earlier tasks used."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from agcl.model.adapter import WEIGHTS, factor_a
from agcl.modulation.projection import project_out

_BEFORE, _FACTOR_A = "base_model.model.", ".lora_A.weight"


@torch.no_grad()
def keep_away(peft_model: PeftModel, basis: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove input directions, keyed by weight, from every factor A; the basis by A's names.

    With them removed from A and from all its updates, B A x is zero for any x among them.
    """
    factors = dict(peft_model.get_base_model().named_parameters())
    by_factor = {factor_a(name): tensor for name, tensor in basis.items()}
    for name, tensor in by_factor.items():
        factors[name].copy_(project_out(factors[name], tensor.to(factors[name])))
    return by_factor


def directions(folders: Sequence[Path]) -> dict[str, Tensor]:
    """The A of saved adapters, stacked: (sum of ranks, in) by the name of the weight."""
    found: dict[str, list[Tensor]] = {}
    for folder in folders:
        for key, tensor in load_file(folder / WEIGHTS).items():
            if key.endswith(_FACTOR_A):
                name = key.removeprefix(_BEFORE).removesuffix(_FACTOR_A) + ".weight"
                found.setdefault(name, []).append(tensor)
    return {name: torch.cat(parts) for name, parts in found.items()}


def orthogonality(
    peft_model: PeftModel, earlier: Mapping[str, Tensor], *, strength: float
) -> Callable[[], Tensor]:
    """λ Σ |A_earlier Aᵀ| over layers and entries, λ the `strength`; called, it is differentiable.

    The absolute value is that of the authors' code; the paper's eq. 8 squares the entries.
    """
    own = {
        name.removeprefix(_BEFORE).removesuffix(".lora_A.default.weight") + ".weight": parameter
        for name, parameter in peft_model.named_parameters()
        if ".lora_A." in name
    }
    pairs = [
        (tensor.to(own[name].device, own[name].dtype), own[name])
        for name, tensor in earlier.items()
    ]

    def penalty() -> Tensor:
        return strength * torch.stack([(old @ new.T).abs().sum() for old, new in pairs]).sum()

    return penalty
