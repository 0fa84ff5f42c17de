"""CorDA's start for LoRA: factors of the directions of a weight that general data use least.

CorDA in its knowledge-preserved mode (Yang et al. 2024, arXiv 2406.05223; `init_lora_weights:
corda` in PEFT). With C, the mean over general texts of Σ x xᵀ of a layer's input, the singular
value decomposition W C = U S Vᵀ orders a weight's directions by how much the texts use them. As in
PEFT, each text's inputs x are first divided by their largest entry, and 1 % of the mean diagonal of
C is added to its diagonal (doubled until C can be inverted). The factors are made from the last
`rank` directions,

    scale · B A = U_r S_r V_rᵀ C⁻¹,

and subtracted from the weight, so that the model is at first what it was: what is trained is the
part of W that general data need least, and the rest of W is frozen.

PEFT computes C and the decomposition. Adapter folders hold [A; A₀] and [B, -B₀], with A₀ and B₀
the factors at the start: an ordinary LoRA adapter of twice the rank for the weights as they were,
which is PEFT's own conversion of CorDA to LoRA. Hence everybody can load it, and training continues
from it.
"""

from collections.abc import Callable, Sequence
from copy import copy
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import CordaEigens, preprocess_corda
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from agcl.errors import InputError
from agcl.lrp import attributed_linears
from agcl.model import adapter
from agcl.model.forward import any_dtype_attention
from agcl.parallel import sharding

Factors = dict[str, Tensor]
"""A and B of every layer, by their keys in an adapter's file."""


def decompose(
    model: PreTrainedModel,
    texts: Sequence[Sequence[int]],
    *,
    rank: int,
    alpha: float,
    log: Callable[[int], None] = lambda done: None,
) -> Factors:
    """The factors A₀ and B₀ that CorDA starts from, for the attributed layers, on the CPU.

    `texts` are token ids; PEFT takes the mean of C over them. `log` gets the number of texts done.
    The model is left as it was. Raises `InputError` as `check` and `check_rank` do.
    """
    check(model)
    check_rank(model, rank)
    linears = {name.removesuffix(".weight"): m for name, m in attributed_linears(model).items()}
    config = adapter.lora_config(model, rank=rank, alpha=alpha)
    config.corda_config = CordaConfig(corda_method="kpm")
    training = model.training

    def read() -> None:
        for done, ids in enumerate(texts, start=1):
            model(torch.tensor([list(ids)], device=model.device), use_cache=False)
            log(done)

    with any_dtype_attention(model):
        preprocess_corda(model, config, run_model=read)
    model.train(training)
    found: Factors = {}
    for name, linear in linears.items():
        eigens = cast(CordaEigens, linear.eigens)
        del linear.eigens
        size = (eigens.S_WC * (rank / alpha)).sqrt()
        found[f"{adapter.PREFIX}{name}{adapter.FACTOR_A}"] = (
            (eigens.V_WC * size).T.contiguous().cpu()
        )
        found[f"{adapter.PREFIX}{name}.lora_B.weight"] = (eigens.U_WC * size).contiguous().cpu()
    return found


def check(model: PreTrainedModel) -> None:
    """Raise `InputError` for a model that cannot be decomposed: sharded, or not in float32.

    Less exact weights would lose more by the subtraction than CorDA could keep.
    """
    if sharding.is_sharded(model):
        raise InputError("adapter.init: corda cannot decompose the weights of a sharded model")
    if model.dtype not in (torch.float32, torch.float64):
        raise InputError("adapter.init: corda needs weights in float32, model.dtype=float32")


def check_rank(model: PreTrainedModel, rank: int) -> None:
    """Raise `InputError` for a rank above the smaller side of a layer."""
    weights = (cast(Tensor, linear.weight) for linear in attributed_linears(model).values())
    narrow = min(min(weight.shape) for weight in weights)
    if rank > narrow:
        raise InputError(
            f"adapter.rank: {rank} is more than {narrow}, the singular directions of a layer"
        )


def attach(
    model: PreTrainedModel, *, rank: int, alpha: float, start: Path
) -> tuple[PeftModel, Factors]:
    """Subtract A₀ and B₀ of the adapter in `start` from the weights, and train its A and B.

    Also returns A₀ and B₀, which `save` needs. Raises `InputError` if it is no adapter of twice the
    rank.
    """
    check(model)
    adapter.check_saved(start, 2 * rank)
    both = load_file(start / adapter.WEIGHTS)
    initial = {
        key: (t[rank:] if _is_a(key) else -t[:, rank:]).contiguous() for key, t in both.items()
    }
    peft_model = adapter.attach(model, rank=rank, alpha=alpha, seed=0)
    with torch.no_grad():
        for name, layer in peft_model.named_modules():
            if not isinstance(layer, LoraLayer):
                continue
            keys = [f"{name}.lora_{factor}.weight" for factor in "AB"]
            weight = cast(Tensor, layer.get_base_layer().weight)
            a, b = (initial[key].to(weight) for key in keys)
            update = alpha / rank * b @ a
            weight.sub_(update.T if layer.fan_in_fan_out else update)
            parameters = dict(layer.named_parameters())
            for key, factor in zip(keys, "AB", strict=True):
                current = both[key][:rank] if factor == "A" else both[key][:, :rank]
                parameters[f"lora_{factor}.default.weight"].copy_(current)
    return peft_model, initial


def save(
    peft_model: PeftModel,
    initial: Factors,
    folder: Path,
    base: Path | str,
    revision: str | None = None,
) -> None:
    """Write the change since the start as an ordinary PEFT adapter on the `base` as it was."""
    config = cast(LoraConfig, peft_model.peft_config["default"])
    write(config, get_peft_model_state_dict(peft_model), initial, folder, base, revision)


def write(
    config: LoraConfig,
    factors: Factors,
    initial: Factors,
    folder: Path,
    base: Path | str,
    revision: str | None = None,
) -> None:
    """Write an adapter whose update is that of the factors minus that of the initial ones.

    `config` is that of an adapter with these factors.
    """
    both = {
        key: torch.cat([tensor.cpu(), initial[key]])
        if _is_a(key)
        else torch.cat([tensor.cpu(), -initial[key]], 1)
        for key, tensor in factors.items()
    }
    doubled = copy(config)
    doubled.r, doubled.lora_alpha, doubled.inference_mode = (
        2 * config.r,
        2 * config.lora_alpha,
        True,
    )
    doubled.base_model_name_or_path, doubled.revision = str(base), revision
    folder.mkdir(parents=True, exist_ok=True)
    doubled.save_pretrained(str(folder))
    save_file(both, folder / adapter.WEIGHTS, metadata={"format": "pt"})


def _is_a(key: str) -> bool:
    return key.endswith(adapter.FACTOR_A)
