"""Which modules of a model family get which rule: one literal table per family.

To add a family, add an entry to `FAMILIES`; see CONTRIBUTING.md.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from agcl.errors import InputError
from agcl.lrp.rules import constant_scale

NormRule = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""(module, input, output) -> the output, with the norm's scale held constant in the backward."""


def rms_norm(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Llama's RMSNorm, `weight * x / rms(x)`."""
    weight, epsilon = cast(Tensor, module.weight), cast(float, module.variance_epsilon)
    return constant_scale(x, y, (weight * _inverse_rms(x, epsilon)).to(x.dtype))


def gemma_norm(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Gemma's RMSNorm, `(1 + weight) * x / rms(x)`."""
    weight, epsilon = cast(Tensor, module.weight), cast(float, module.eps)
    scale = (1 + weight.float()) * _inverse_rms(x, epsilon)
    return constant_scale(x, y, scale.to(x.dtype))


def layer_norm(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """LayerNorm, `weight * (x - mean(x)) / std(x) + bias`; centering is linear and kept."""
    norm = cast(nn.LayerNorm, module)
    scale = (x.var(-1, unbiased=False, keepdim=True) + norm.eps).rsqrt()
    return constant_scale(x, y, scale * norm.weight, centered=True)


def _inverse_rms(x: Tensor, epsilon: float) -> Tensor:
    wide = x.to(torch.float32) if x.dtype in (torch.float16, torch.bfloat16) else x
    return torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)


@dataclass(frozen=True)
class Family:
    """Module names (dotted, `#` for a layer number) relative to the causal language model."""

    linears: tuple[str, ...]
    """Linear layers whose weights are attributed and protected."""
    norms: tuple[str, ...]
    norm: NormRule
    activations: tuple[str, ...]
    """Element-wise activations; in a gated MLP, those of the gate branch."""
    products: tuple[str, ...] = ()
    """Linear layers whose input is a product of two branches (gate · up); empty if the MLP has no
    gate."""


def _in(parent: str, names: str) -> tuple[str, ...]:
    return tuple(f"{parent}.{name}" for name in names.split())


_LLAMA = Family(
    linears=(
        *_in("model.layers.#.self_attn", "q_proj k_proj v_proj o_proj"),
        *_in("model.layers.#.mlp", "gate_proj up_proj down_proj"),
    ),
    norms=(*_in("model.layers.#", "input_layernorm post_attention_layernorm"), "model.norm"),
    norm=rms_norm,
    activations=("model.layers.#.mlp.act_fn",),
    products=("model.layers.#.mlp.down_proj",),
)
_HEAD_NORMS = _in("model.layers.#.self_attn", "q_norm k_norm")
_MLP_NORMS = _in("model.layers.#", "pre_feedforward_layernorm post_feedforward_layernorm")
_GEMMA2 = replace(_LLAMA, norms=(*_LLAMA.norms, *_MLP_NORMS), norm=gemma_norm)
_PHI3 = replace(
    _LLAMA,
    linears=(
        *_in("model.layers.#.self_attn", "qkv_proj o_proj"),
        *_in("model.layers.#.mlp", "gate_up_proj down_proj"),
    ),
    activations=("model.layers.#.mlp.activation_fn",),
)
_GPT2 = Family(
    linears=_in("transformer.h.#", "attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj"),
    norms=_in("transformer", "h.#.ln_1 h.#.ln_2 ln_f"),
    norm=layer_norm,
    activations=("transformer.h.#.mlp.act",),
)
_GPT_NEOX = Family(
    linears=(
        *_in("gpt_neox.layers.#.attention", "query_key_value dense"),
        *_in("gpt_neox.layers.#.mlp", "dense_h_to_4h dense_4h_to_h"),
    ),
    norms=(
        *_in("gpt_neox.layers.#", "input_layernorm post_attention_layernorm"),
        "gpt_neox.final_layer_norm",
    ),
    norm=layer_norm,
    activations=("gpt_neox.layers.#.mlp.act",),
)

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": _LLAMA,
    "Qwen3ForCausalLM": replace(_LLAMA, norms=(*_LLAMA.norms, *_HEAD_NORMS)),
    "Gemma2ForCausalLM": _GEMMA2,
    "Gemma3ForCausalLM": replace(_GEMMA2, norms=(*_GEMMA2.norms, *_HEAD_NORMS)),
    "Phi3ForCausalLM": _PHI3,
    "GPT2LMHeadModel": _GPT2,
    "GPTNeoXForCausalLM": _GPT_NEOX,
}
"""By the class name in the model's `config.json`."""


def family_named(architecture: str) -> Family:
    """The table of an architecture, by the class name in the model's `config.json`.

    Raises `InputError` if there is none.
    """
    if architecture not in FAMILIES:
        raise InputError(
            f"architecture {architecture} is not supported: agcl/lrp/families.py has no entry "
            f"for it (supported: {', '.join(FAMILIES)})"
        )
    return FAMILIES[architecture]


def architecture_of(model: nn.Module) -> str:
    """The name of a model's class, without the prefix that FSDP2 adds.

    Raises `ValueError` for a PEFT wrapper, whose names have a prefix that the model's do not.
    """
    if hasattr(model, "get_base_model"):
        raise ValueError(
            f"{type(model).__name__} is a PEFT wrapper: pass model.get_base_model(), whose layers "
            "have the adapter, and its named_parameters()"
        )
    return type(model).__name__.removeprefix("FSDP")


def modules_named(model: nn.Module, patterns: tuple[str, ...]) -> dict[str, nn.Module]:
    """The modules whose full name matches one of the patterns, in model order."""
    regex = re.compile("|".join(re.escape(p).replace(r"\#", r"\d+") for p in patterns))
    return {name: module for name, module in model.named_modules() if regex.fullmatch(name)}


def attributed_linears(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers that are attributed and protected, keyed by their weight's name.

    Each is `nn.Linear` or GPT-2's `Conv1D`, whose weight is stored (in, out); for a layer with
    PEFT's LoRA, the factors A and B of the active adapters, since the others are never called.
    Keys are those of `model.named_parameters()`, such as `model.layers.0.mlp.up_proj.weight` or
    `model.layers.0.mlp.up_proj.lora_A.default.weight`.
    """
    family = family_named(architecture_of(model))
    linears: dict[str, nn.Module] = {}
    for name, module in modules_named(model, family.linears).items():
        if isinstance(module, nn.Linear | Conv1D):
            linears[f"{name}.weight"] = module
        for factors in ("lora_A", "lora_B"):
            by_adapter = getattr(module, factors, {})
            active = [a for a in by_adapter if a in cast(list[str], module.active_adapters)]
            linears |= {f"{name}.{factors}.{a}.weight": by_adapter[a] for a in active}
    return linears


def weight_of(linear: nn.Module) -> Tensor:
    """The weight of an attributed layer as a view of shape (out, in)."""
    weight = cast(Tensor, linear.weight)
    return weight.T if isinstance(linear, Conv1D) else weight


def input_width(linear: nn.Module) -> int:
    """The width of an attributed layer's input, also where its weight is packed into four bits."""
    return len(linear.weight) if isinstance(linear, Conv1D) else cast(nn.Linear, linear).in_features


def stored_transposed(model: nn.Module) -> frozenset[str]:
    """Names of the attributed weights that are stored (in, out)."""
    return frozenset(n for n, m in attributed_linears(model).items() if isinstance(m, Conv1D))
