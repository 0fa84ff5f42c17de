"""LoRA through PEFT, for the baselines that train factors of an update instead of the weights.

`lora` trains one adapter on through all tasks. `olora` is O-LoRA (Wang 2023, arXiv 2310.14152): a
fresh adapter a task, whose A is kept orthogonal to those of the earlier tasks.
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
from agcl.lrp import attributed_linears

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
        return PeftModel.from_pretrained(model, start, is_trainable=True)
    config = LoraConfig(
        r=rank,
        lora_alpha=cast(int, alpha),
        lora_dropout=0.0,
        bias="none",
        target_modules=[name.removesuffix(".weight") for name in attributed_linears(model)],
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return cast(PeftModel, get_peft_model(model, config))


def detach(peft_model: PeftModel, folder: Path | None = None) -> PreTrainedModel:
    """Merge the factors into the weights, and first save them as a PEFT adapter in `folder`."""
    if folder is not None:
        peft_model.save_pretrained(str(folder), safe_serialization=True)
    model = cast(PreTrainedModel, peft_model.merge_and_unload())
    return model.requires_grad_(True)


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
