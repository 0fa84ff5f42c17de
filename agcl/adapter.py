"""LoRA through PEFT: factors of an update are trained instead of the weights.

One adapter is trained on through all tasks, its A and B protected like weights; or a fresh one a
task, whose A is kept orthogonal to those of the earlier tasks (O-LoRA, Wang 2023, arXiv 2310.14152)
or to the inputs that they used (as in InfLoRA, Liang and Li 2024, arXiv 2404.00228).

Inside PEFT's wrapper, `peft_model.get_base_model()` is the model with its layers replaced: it is
called, attributed and trained like any other, with names that do not begin with the wrapper's.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from agcl.errors import InputError
from agcl.lrp import attributed_linears, stored_transposed
from agcl.modulation.projection import project_out

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_BEFORE, _FACTOR_A = "base_model.model.", ".lora_A.weight"


def attach(
    model: PreTrainedModel, *, rank: int, alpha: float, seed: int, start: Path | None = None
) -> PeftModel:
    """Put LoRA factors on the attributed linear layers; only they are trained then.

    ΔW = (alpha / rank) B A with A (rank, in) drawn by the seed and B (out, rank) zero, or both
    from the adapter in the folder `start`. Raises `InputError` where that is none of this rank.
    """
    if start is not None:
        _check(start, rank)
        return load(model, start)
    config = LoraConfig(
        r=rank,
        lora_alpha=cast(int, alpha),
        lora_dropout=0.0,
        bias="none",
        target_modules=[name.removesuffix(".weight") for name in attributed_linears(model)],
        fan_in_fan_out=bool(stored_transposed(model)),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return cast(PeftModel, get_peft_model(model, config))


def load(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Put a saved adapter on its model, to be trained on."""
    return PeftModel.from_pretrained(model, folder, is_trainable=True)


def save(peft_model: PeftModel, folder: Path, base: Path) -> None:
    """Write an ordinary PEFT adapter, which says that it belongs to the model in `base`."""
    peft_model.peft_config["default"].base_model_name_or_path = str(base)
    peft_model.save_pretrained(str(folder), safe_serialization=True)


def merged(peft_model: PeftModel) -> PreTrainedModel:
    """The model with the factors' products added to its weights."""
    return cast(PreTrainedModel, peft_model.merge_and_unload()).requires_grad_(True)


def removed(peft_model: PeftModel) -> PreTrainedModel:
    """The model as it was before the factors were put on."""
    return cast(PreTrainedModel, peft_model.unload()).requires_grad_(True)


def factor_a(name: str) -> str:
    """The name of the factor A on the weight of that name."""
    return name.removesuffix(".weight") + ".lora_A.default.weight"


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
        for key, tensor in load_file(folder / _WEIGHTS).items():
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


def _check(folder: Path, rank: int) -> None:
    for file in (_CONFIG, _WEIGHTS):
        if not (folder / file).is_file():
            raise InputError(f"{folder}: no {file}, so no adapter to go on with")
    found = json.loads((folder / _CONFIG).read_text(encoding="utf-8")).get("r")
    if found != rank:
        raise InputError(f"{folder}: an adapter of rank {found}, not {rank} (adapter.rank)")
