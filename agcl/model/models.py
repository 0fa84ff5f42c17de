"""Models and tokenizers: loading, saving, and what a folder's `config.json` says."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from agcl.errors import InputError, one_line
from agcl.model.attention import repeat_where_needed
from agcl.parallel import distributed, sharding

_FIXED_DATE = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"
"""The date that Llama's templates have where they do not know today's."""
_SHARD_SIZE = "5GB"
"""Maximum bytes of a saved weight file, which `save_in` reads as a whole."""


def load_model(
    folder: Path,
    *,
    dtype: str = "float32",
    attention: str = "sdpa",
    quantization: str | None = None,
) -> PreTrainedModel:
    """Load a causal language model. No remote code, safetensors only, no dropout.

    `dtype` is a name of torch's, `attention` one of transformers' implementations; a model without
    `sdpa` has `eager`. `quantization` `nf4` quantizes the linear layers with bitsandbytes (Dettmers
    2023, QLoRA, arXiv 2305.14314), which then compute in `dtype`. Raises `InputError` if the files
    lack a weight; transformers would initialize it randomly.
    """
    model = open_model(folder, dtype=dtype, attention=attention, quantization=quantization)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes' faster path on a CPU repacks weights, and fails for some widths.
            module.support_avx512bf16_for_cpu = False
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    repeat_where_needed(model)
    return model


def open_model(
    folder: Path,
    device: str = "cpu",
    dtype: str = "float32",
    attention: str = "sdpa",
    quantization: str | None = None,
) -> PreTrainedModel:
    """The folder's model; on the device `meta`, without reading its weights.

    Raises `InputError` if the files lack a weight.
    """
    quantized = quantization and BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )
    loaded: tuple[PreTrainedModel, dict[str, Any]] = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, dtype),
        # sdpa is transformers' own choice, which falls back to eager; asked for, it may raise.
        attn_implementation=None if attention == "sdpa" else attention,
        device_map=None if device == "cpu" else device,
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        output_loading_info=True,
        # Given as None, it would be taken as a setting of the model.
        **({"quantization_config": quantized} if quantized else {}),
    )
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise InputError(
            f"the weights in {folder} lack {len(missing)} of the model's parameters, "
            f"such as {missing[0]}"
        )
    return model


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load a folder's tokenizer. A chat template that asks for today's date gets 26 Jul 2024.

    Raises `InputError` if it cannot be read or has no end-of-sequence token.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # transformers and tokenizers raise anything.
        raise InputError(f"no readable tokenizer in {folder} ({one_line(error, 200)})") from None
    if tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer in {folder} has no end-of-sequence token")
    template = tokenizer.chat_template
    if isinstance(template, str):
        tokenizer.chat_template = _dated(template)
    elif isinstance(template, dict):
        tokenizer.chat_template = {name: _dated(text) for name, text in template.items()}
    return tokenizer


def _dated(template: str) -> str:
    """With today's date, equal runs on two days would train on unequal tokens."""
    is_open = "strftime_now" in template and not template.startswith(_FIXED_DATE)
    return _FIXED_DATE + template if is_open else template


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    end: int | None = None,
) -> None:
    """Write a folder that transformers can load. Collective: only rank 0 writes.

    Its `generate` stops at the tokenizer's end token, and at the token `end`, such as that of a
    chat template, by which the answers end that the model was taught; of a list of end tokens that
    the model came with, it keeps the others. Rank 0 needs CPU memory for a whole sharded model.
    """
    taught = [tokenizer.eos_token_id, *([] if end is None else [end])]
    for config in (model.config, model.generation_config):
        known = config.eos_token_id
        ends = list(dict.fromkeys([*taught, *(known if isinstance(known, list) else [])]))
        config.eos_token_id = ends if len(ends) > 1 else ends[0]
        if config.eos_token_id != known and isinstance(config, GenerationConfig):
            _allow_sampling(config)
    state = None
    if sharding.is_sharded(model):
        state = dict(sharding.on_rank_zero(model.named_parameters()))
    if distributed.rank() == 0:
        model.save_pretrained(folder, state_dict=state, max_shard_size=_SHARD_SIZE)
        tokenizer.save_pretrained(folder)


def _allow_sampling(config: GenerationConfig) -> None:
    """Sample if the config has sampling settings: changed, it is not saved with unused ones."""
    try:
        config.validate(strict=True)
    except ValueError:
        config.do_sample = True


def stored_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The dtype of the weights by a `config.json`: bfloat16 or float16, otherwise float32."""
    half = {"bfloat16": torch.bfloat16, "float16": torch.float16}
    return half.get(str(config.get("dtype", config.get("torch_dtype"))), torch.float32)


def save_in(dtype: torch.dtype, file: Path, target: Path) -> None:
    """Copy `config.json` or a weight file of a saved model, changed to `dtype`."""
    if file.suffix == ".json":
        config = json.loads(file.read_text(encoding="utf-8"))
        config["dtype"] = str(dtype).removeprefix("torch.")
        target.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        return
    with safe_open(file, framework="pt") as stored:
        tensors = {name: stored.get_tensor(name).to(dtype) for name in stored.keys()}  # noqa: SIM118
        save_file(tensors, target, metadata=stored.metadata())


def config_of(folder: Path) -> PretrainedConfig:
    """What `config.json` in a folder says."""
    config: PretrainedConfig = AutoConfig.from_pretrained(
        folder, trust_remote_code=False, local_files_only=True
    )
    return config


def positions(folder: Path) -> int:
    """The most tokens that the folder's model was made for."""
    return int(config_of(folder).max_position_embeddings)


def num_weights(folder: Path) -> int:
    """The number of parameters of the folder's model, tied ones once; reads `config.json` only."""
    return sum(parameter.numel() for parameter in empty_model(folder).parameters())


def empty_model(folder: Path) -> PreTrainedModel:
    """The folder's model on the meta device: parameter names and shapes without memory."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config_of(folder))
    return model
