"""The parameters of a model that wrappers hold: found by the name that they have without them.

Wrappers: DDP, `torch.compile`, PEFT, and any of them around another.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from agcl.modulation.projection import projected_part

_OUTER = re.compile(r"^(?:(?:module|_orig_mod|base_model\.model)\.)+")
_INNER = re.compile(r"\.(?:_orig_mod|base_layer|modules_to_save\.[^.]+)(?=\.)")
_FACTOR_A = re.compile(r"(.+)\.lora_A\.[^.]+\.weight")
_ROUNDING = 1e-3
"""Share of a trained factor A in the protected directions that is taken for rounding."""


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The transformers model itself; of a PEFT model the one that has the adapter's layers."""
    while True:
        if isinstance(model, DataParallel | DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = cast(nn.Module, model._orig_mod)
        elif isinstance(model, PeftModel):
            model = model.get_base_model()
        else:
            return cast(PreTrainedModel, model)


def plain(name: str) -> str:
    """A parameter's name without what wrappers add: `model.layers.0.mlp.up_proj.weight`."""
    return _INNER.sub("", _OUTER.sub("", name))


@dataclass
class Found:
    """What a gate and a basis protect in a model, keyed by its own parameter names."""

    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    gate: dict[str, Tensor] = field(default_factory=dict)
    basis: dict[str, Tensor] = field(default_factory=dict)
    transposed: set[str] = field(default_factory=set)
    factors: list[str] = field(default_factory=list)
    """The factors A that are to let nothing of their basis through."""
    unprotected: list[str] = field(default_factory=list)
    """Trained parameters that nothing protects."""


def find(
    model: nn.Module, gate: Mapping[str, Tensor] | None, basis: Mapping[str, Tensor] | None
) -> Found:
    """Find what `gate` and `basis`, keyed by plain names, protect among the trained parameters.

    For a weight with LoRA, a basis protects the factors A. Frozen weights need no protection.
    Raises `ValueError` for a name that the model does not have, if none of the weights is trained,
    and for what cannot be protected: sharded weights, adapters other than LoRA, a gate on a weight
    that LoRA changes.
    """
    refuse_unsupported(model)
    found = Found(parameters=dict(model.named_parameters()))
    by_plain = {plain(name): name for name in found.parameters}
    factors = _factors(found.parameters)
    for name in {**(gate or {}), **(basis or {})}:
        if name not in by_plain:
            raise ValueError(
                f"the model has no parameter {name}, which the gate or basis is for: it was "
                "measured on another model"
            )
    trained = {name for name, p in found.parameters.items() if p.requires_grad}
    for name, tensor in (gate or {}).items():
        if name in factors:
            raise ValueError(
                f"LoRA changes {name} by a product of factors, which a gate cannot hold: "
                "protect a basis instead"
            )
        if by_plain[name] in trained:
            found.gate[by_plain[name]] = tensor
    for name, tensor in (basis or {}).items():
        of_layer = factors.get(name, [])
        found.factors += of_layer
        for each in filter(trained.__contains__, (by_plain[name], *of_layer)):
            if each in found.basis:
                raise ValueError(
                    f"{each} has two bases, its layer's and its own, as if measured on a model "
                    "with this adapter: merge it (merge_and_unload), measure the merged model, "
                    "and start another adapter"
                )
            found.basis[each] = tensor
    if not found.gate and not found.basis:
        raise ValueError("nothing to protect: no weight of the gate or basis is trained")
    found.transposed = {
        f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)
    } & trained
    # What A does not let through, B cannot put out.
    with_b = {name.replace(".lora_A.", ".lora_B.") for name in found.basis}
    found.unprotected = sorted(trained - {*found.gate, *found.basis} - with_b)
    return found


@torch.no_grad()
def keep_factors_away(found: Found) -> None:
    """Remove the protected directions from new LoRA factors A, in place; B is zero, so the model
    stays the same.

    Raises `ValueError` for an adapter that was trained with these directions in its A.
    """
    for name in found.factors:
        a, b = (found.parameters[n] for n in (name, name.replace(".lora_A.", ".lora_B.")))
        taken = projected_part(a, found.basis[name].to(a))
        if not b.any():
            a.sub_(taken)
        elif taken.norm() > _ROUNDING * a.norm():
            raise ValueError(
                f"{name} already reads protected directions: only a new adapter can be kept off "
                "them. Merge this one into the model and start another, or use LoRA's default "
                "initialization"
            )


def freeze_others(model: nn.Module, names: Collection[str]) -> None:
    """Train nothing but the weights with these plain names, and LoRA factors.

    Embeddings, norms and biases have no inputs that a basis could keep them off. Call it before
    the `Trainer` is made. What is frozen already stays so.
    """
    for name, parameter in model.named_parameters():
        if plain(name) not in names and ".lora_" not in name:
            parameter.requires_grad_(False)


def refuse_unsupported(model: nn.Module) -> None:
    """Raise `ValueError` for sharded weights and for adapters whose inputs cannot be protected."""
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor) or hasattr(parameter, "ds_id"):
            raise ValueError(
                f"{name} is sharded; protection inside a Trainer needs whole weights on every "
                "process (DDP). For models larger than a device use agcl's own runs"
            )
        if "lora_magnitude_vector" in name and parameter.requires_grad:
            raise ValueError(f"{name}: DoRA changes outputs for all inputs; use plain LoRA")
    for module in model.modules():
        if isinstance(module, FullyShardedDataParallel):
            raise ValueError("FSDP holds flat pieces of weights, which cannot be protected")
        if isinstance(module, PeftModel):
            for config in module.peft_config.values():
                if str(getattr(config.peft_type, "value", config.peft_type)) != "LORA":
                    raise ValueError(f"a {config.peft_type} adapter cannot be protected, only LoRA")


def _factors(parameters: Mapping[str, nn.Parameter]) -> dict[str, list[str]]:
    """The trained factors A by the plain name of their layer's weight."""
    found: dict[str, list[str]] = {}
    for name, parameter in parameters.items():
        match = _FACTOR_A.fullmatch(name)
        if match and parameter.requires_grad:
            found.setdefault(plain(match[1]) + ".weight", []).append(name)
    return found
