"""Which modules of a model family get which rule: one literal table a family.

A new family is one more entry of `FAMILIES`; see CONTRIBUTING.md.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn


def rms_norm_scale(module: nn.Module, x: Tensor) -> Tensor:
    """`weight / rms(x)`, the factor of Llama's RMSNorm, shape of `x`."""
    wide = x.to(torch.float32) if x.dtype in (torch.float16, torch.bfloat16) else x
    weight, epsilon = cast(Tensor, module.weight), cast(float, module.variance_epsilon)
    inverse_rms = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return (weight * inverse_rms).to(x.dtype)


@dataclass(frozen=True)
class Family:
    """Module names (dots, `#` for a layer number) relative to the causal language model."""

    linears: tuple[str, ...]
    """Linear layers whose weights are attributed and protected."""
    norms: tuple[str, ...]
    norm_scale: Callable[[nn.Module, Tensor], Tensor]
    activations: tuple[str, ...]
    """Element-wise activations; in a gated MLP, of the gate branch."""
    products: tuple[str, ...]
    """Linear layers whose input is a product of two branches (gate · up)."""


_LLAMA = Family(
    linears=(
        "model.layers.#.self_attn.q_proj",
        "model.layers.#.self_attn.k_proj",
        "model.layers.#.self_attn.v_proj",
        "model.layers.#.self_attn.o_proj",
        "model.layers.#.mlp.gate_proj",
        "model.layers.#.mlp.up_proj",
        "model.layers.#.mlp.down_proj",
    ),
    norms=(
        "model.layers.#.input_layernorm",
        "model.layers.#.post_attention_layernorm",
        "model.norm",
    ),
    norm_scale=rms_norm_scale,
    activations=("model.layers.#.mlp.act_fn",),
    products=("model.layers.#.mlp.down_proj",),
)

FAMILIES: dict[str, Family] = {"LlamaForCausalLM": _LLAMA}


class UnsupportedArchitecture(ValueError):
    """The model's class has no entry in `FAMILIES`."""


def family_named(architecture: str) -> Family:
    """The table of an architecture, by the class name in the model's `config.json`.

    Raises `UnsupportedArchitecture` where there is none.
    """
    if architecture not in FAMILIES:
        raise UnsupportedArchitecture(
            f"architecture {architecture} is not supported: agcl/lrp/families.py has no table "
            f"for it (supported: {', '.join(FAMILIES)})"
        )
    return FAMILIES[architecture]


def modules_named(model: nn.Module, patterns: tuple[str, ...]) -> dict[str, nn.Module]:
    """The modules whose whole name fits one of the patterns, in model order."""
    fits = re.compile("|".join(re.escape(p).replace(r"\#", r"\d+") for p in patterns))
    return {name: module for name, module in model.named_modules() if fits.fullmatch(name)}


def attributed_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers that are attributed and protected, keyed by their weight's name.

    Keys are those of `model.named_parameters()`, e.g. `model.layers.0.mlp.up_proj.weight`.
    """
    family = family_named(type(model).__name__)
    found = modules_named(model, family.linears)
    return {f"{name}.weight": m for name, m in found.items() if isinstance(m, nn.Linear)}
