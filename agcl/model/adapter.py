"""LoRA through PEFT: factors of an update are trained instead of the weights.

One adapter is trained on through all tasks, its A and B protected like weights; or a fresh one a
task, whose A is kept orthogonal to those of the earlier tasks (O-LoRA, Wang 2023, arXiv 2310.14152)
or to the inputs that they used (as in InfLoRA, Liang and Li 2024, arXiv 2404.00228).

Inside PEFT's wrapper, `peft_model.get_base_model()` is the model with its layers replaced: it is
called, attributed and trained like any other, with names that do not begin with the wrapper's.
"""

import json
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from agcl.errors import InputError
from agcl.lrp import attributed_linears, stored_transposed

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


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


def _check(folder: Path, rank: int) -> None:
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise InputError(f"{folder}: no {file}, so no adapter to go on with")
    found = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("r")
    if found != rank:
        raise InputError(f"{folder}: an adapter of rank {found}, not {rank} (adapter.rank)")
