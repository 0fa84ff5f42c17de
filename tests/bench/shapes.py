"""Models with random weights in the shapes of known ones, made on the device that they run on."""

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from agcl.model import models
from agcl.model.builtin import BUILTIN, builtin_model
from agcl.model.check import check_folder
from bench.sizes import LLAMAS

_SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
_TOY = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-shape": _SMOLLM2,
    "1b-shape": LLAMAS["Llama-3.2-1B"],
    "8b-shape": LLAMAS["Llama-3.1-8B"],
    "toy-shape": _TOY,
}


def random_model(name: str, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """A model of one of `SHAPES`, the same weights on every call."""
    # Drawing billions of weights on a CPU, and copying them to the GPU, takes minutes.
    with torch.device(device):
        torch.manual_seed(0)
        return LlamaForCausalLM._from_config(LlamaConfig(**SHAPES[name]), dtype=dtype)


def save_random(folder: Path, sizes: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Path:
    """Save a Llama of these sizes with random weights, and the tokenizer."""
    ends = {"bos_token_id": None, "pad_token_id": 0, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{"max_position_embeddings": 2048, **sizes, **ends}))
    models.save(model, tokenizer, folder)
    return folder


def loaded(path: str, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """The built-in model, one of `SHAPES`, or that of a folder.

    Raises `InputError` if the folder has no model.
    """
    if path in SHAPES:
        return random_model(path, device, dtype)
    if path == BUILTIN:
        return builtin_model(512, seed=0).to(device, dtype)
    check_folder(Path(path))
    return models.load_model(Path(path)).to(device, dtype)
