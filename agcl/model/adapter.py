"""LoRA through PEFT: train low-rank factors of an update instead of the weights.

Either one adapter is trained on all tasks, with A and B protected like weights, or each task gets
a new adapter whose A is kept orthogonal to those of earlier tasks (O-LoRA, Wang 2023, arXiv
2310.14152) or to the inputs they used (as in InfLoRA, Liang and Li 2024, arXiv 2404.00228).

`peft_model.get_base_model()` is the model inside PEFT's wrapper, with its layers replaced. It is
called, attributed and trained like any other model; its names do not have the wrapper's prefix.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import PreTrainedModel

from agcl.errors import InputError
from agcl.lrp import attributed_linears, stored_transposed
from agcl.parallel import sharding

_ADAPTER = "default"
PREFIX, FACTOR_A = "base_model.model.", ".lora_A.weight"
"""What the keys in an adapter's file begin and end with, around a layer's name."""
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def attach(
    model: PreTrainedModel, *, rank: int, alpha: float, seed: int, start: Path | None = None
) -> PeftModel:
    """Add trainable LoRA factors to the attributed linear layers and freeze everything else.

    ΔW = (alpha / rank) B A with A (rank, in) random from `seed` and B (out, rank) zero, or both
    loaded from the adapter in `start`. Raises `InputError` if that is not an adapter of this rank.
    """
    if start is not None:
        check_saved(start, rank, alpha)
        return load(model, start)
    config = lora_config(model, rank=rank, alpha=alpha)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return cast(PeftModel, get_peft_model(model, config))


def lora_config(model: PreTrainedModel, *, rank: int, alpha: float) -> LoraConfig:
    """PEFT's config of an adapter on the attributed linear layers."""
    return LoraConfig(
        r=rank,
        lora_alpha=cast(int, alpha),
        lora_dropout=0.0,
        bias="none",
        target_modules=[name.removesuffix(".weight") for name in attributed_linears(model)],
        fan_in_fan_out=bool(stored_transposed(model)),
        task_type="CAUSAL_LM",
    )


def load(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Add a saved adapter to its model, trainable."""
    # By default PEFT reads the file onto the first GPU, on every rank. It moves it to the weights.
    return PeftModel.from_pretrained(model, folder, is_trainable=True, torch_device="cpu")


def save(
    peft_model: PeftModel, folder: Path, base: Path | str, revision: str | None = None
) -> None:
    """Write an ordinary PEFT adapter whose config names its `base`, a folder or a hub id."""
    config = peft_model.peft_config[_ADAPTER]
    config.base_model_name_or_path, config.revision = str(base), revision
    # Embeddings are never trained. By default PEFT would ask the hub whether they were resized.
    peft_model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)


def merged(peft_model: PeftModel) -> PreTrainedModel:
    """The model with the adapter merged into its weights."""
    if not sharding.is_sharded(peft_model.get_base_model()):
        return cast(PreTrainedModel, peft_model.merge_and_unload()).requires_grad_(True)
    for layer in peft_model.modules():
        if isinstance(layer, LoraLayer):
            # PEFT would add the whole update to each rank's rows.
            weight = cast(Tensor, layer.get_base_layer().weight).detach()
            update = cast(Tensor, layer.get_delta_weight(_ADAPTER)).detach()
            sharding.local(weight).add_(sharding.local(sharding.placed_like(update, weight)))
    return removed(peft_model)


def removed(peft_model: PeftModel) -> PreTrainedModel:
    """The model without the adapter."""
    model = cast(PreTrainedModel, peft_model.unload())
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())  # Not those in four bits.
    return model


@contextmanager
def disabled(model: PreTrainedModel) -> Iterator[None]:
    """Call the model that holds an adapter's layers without the adapter. Without one, as it is."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    flags = [(p, p.requires_grad) for layer in layers for p in layer.parameters()]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, trained in flags:  # PEFT changes them.
            parameter.requires_grad_(trained)


def factor_a(name: str) -> str:
    """The parameter name of a weight's factor A."""
    return name.removesuffix(".weight") + f".lora_A.{_ADAPTER}.weight"


def check_saved(folder: Path, rank: int, alpha: float | None = None) -> None:
    """Raise `InputError` if a folder holds no adapter of this rank and, if given, this alpha."""
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise InputError(f"{folder}: no {file}, so there is no adapter to continue from")
    found = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    for name, key, asked in (("rank", "r", rank), ("alpha", "lora_alpha", alpha)):
        if asked is not None and found.get(key) != asked:
            raise InputError(f"{folder}: the adapter has {name} {found.get(key)}, not {asked}")
