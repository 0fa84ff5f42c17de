"""A tiny model per supported family, built in code."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 40
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_HEADS = {"head_dim": 4, "tie_word_embeddings": True, "query_pre_attn_scalar": 6}

CONFIGS = {
    "LlamaForCausalLM": ("llama", _COMMON),
    "MistralForCausalLM": (
        "mistral",
        {**_COMMON, "head_dim": 4, "sliding_window": 4, "attention_dropout": 0.5},
    ),
    "Qwen2ForCausalLM": ("qwen2", _COMMON),
    "Qwen3ForCausalLM": ("qwen3", {**_COMMON, "head_dim": 4}),
    "Gemma2ForCausalLM": (
        "gemma2",
        {**_COMMON, **_HEADS, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "Gemma3ForCausalLM": ("gemma3_text", {**_COMMON, **_HEADS, "sliding_window": 4}),
    "Phi3ForCausalLM": ("phi3", _COMMON),
    "GPT2LMHeadModel": ("gpt2", {**_COMMON, "n_inner": 24}),
    "GPTNeoXForCausalLM": ("gpt_neox", _COMMON),
}


def model(
    architecture: str,
    *,
    dtype: torch.dtype = torch.float64,
    attention: str | None = None,
    seed: int = 0,
    **changes: Any,
) -> PreTrainedModel:
    """A random model of the family in eval mode, without special values such as 0 or 1."""
    kind, settings = CONFIGS[architecture]
    config = AutoConfig.for_model(kind, **{**settings, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        built = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        for name, parameter in built.named_parameters():
            if "norm" in name or ".ln_" in name or name.endswith("bias"):
                nn.init.uniform_(parameter, 0.2, 0.8)
    assert type(built).__name__ == architecture
    return built.to(dtype).eval()


def without_biases(built: PreTrainedModel) -> PreTrainedModel:
    """Set every bias to zero: a bias absorbs relevance, which then reaches no input."""
    for name, parameter in built.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
    return built


@contextmanager
def flow(linears: Mapping[str, nn.Module]) -> Iterator[dict[str, tuple[torch.Tensor, ...]]]:
    """Input, output and output gradient of every layer reached by a backward pass inside."""
    seen: dict[str, tuple[torch.Tensor, ...]] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            if output.requires_grad:
                output.register_hook(lambda g: seen.update({name: (args[0], output, g)}))

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in linears.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
