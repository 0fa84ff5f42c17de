"""Models and tokenizers: the built-in tiny model, loading, saving, and checks before loading."""

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from agcl.errors import InputError
from agcl.lrp.families import family_named
from agcl.parallel import distributed, sharding

BUILTIN, BUILTIN_LAYERS = "builtin", 4
END, PAD = "<end>", "<pad>"
_SHARD_SIZE = "5GB"
"""Of a saved weight file, which `save_in` reads as a whole."""
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def builtin_tokenizer(texts: Iterable[str], vocab_size: int = 512) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer trained on `texts`. It can encode any text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=PAD)


def builtin_model(vocab_size: int, *, seed: int) -> LlamaForCausalLM:
    """A randomly initialized Llama with 4 layers and width 128, about 0.8M parameters."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=BUILTIN_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        pad_token_id=0,
        eos_token_id=1,
        initializer_range=0.05,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def load_model(folder: Path) -> PreTrainedModel:
    """Load a causal language model in float32. No remote code, safetensors only, no dropout.

    Raises `InputError` if the files lack a weight; transformers would initialize it randomly.
    """
    loaded: tuple[PreTrainedModel, dict[str, Any]] = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        output_loading_info=True,
    )
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise InputError(
            f"model.path: the weights in {folder} lack {len(missing)} of the model's parameters, "
            f"such as {missing[0]}"
        )
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    return model


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load a folder's tokenizer. Raises `InputError` if it has no end-of-sequence token."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        folder, trust_remote_code=False, local_files_only=True
    )
    if tokenizer.eos_token_id is None:
        raise InputError(f"model.path: the tokenizer in {folder} has no end-of-sequence token")
    return tokenizer


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a folder that transformers can load. Collective: only rank 0 writes.

    Its `generate` stops at the tokenizer's end token, which the model was taught; of a list of end
    tokens that the model came with, it keeps the others. Rank 0 needs CPU memory for a whole
    sharded model.
    """
    end = tokenizer.eos_token_id
    for config in (model.config, model.generation_config):
        known = config.eos_token_id
        others = [each for each in known if each != end] if isinstance(known, list) else []
        config.eos_token_id = [end, *others] if others else end
    state = None
    if sharding.is_sharded(model):
        state = dict(sharding.on_rank_zero(model.named_parameters()))
    if distributed.rank() == 0:
        model.save_pretrained(folder, state_dict=state, max_shard_size=_SHARD_SIZE)
        tokenizer.save_pretrained(folder)


def stored_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The dtype of the weights by a `config.json`: bfloat16 or float16, otherwise float32."""
    half = {"bfloat16": torch.bfloat16, "float16": torch.float16}
    return half.get(str(config.get("dtype", config.get("torch_dtype"))), torch.float32)


def save_in(dtype: torch.dtype, file: Path, target: Path) -> None:
    """Copy `config.json` or a weight file of a model saved in float32, changed to `dtype`."""
    if file.suffix == ".json":
        config = json.loads(file.read_text(encoding="utf-8"))
        config["dtype"] = str(dtype).removeprefix("torch.")
        target.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        return
    with safe_open(file, framework="pt") as stored:
        tensors = {name: stored.get_tensor(name).to(dtype) for name in stored.keys()}  # noqa: SIM118
        save_file(tensors, target, metadata=stored.metadata())


def check_folder(folder: Path) -> dict[str, Any]:
    """Check a model folder without loading weights; return its `config.json`.

    Raises `InputError` naming the folder and what is missing or unsupported.
    """
    file = folder / "config.json"
    if not folder.is_dir():
        raise InputError(f"model.path: no folder {folder}")
    if not file.is_file():
        raise InputError(f"model.path: {folder} has no config.json")
    config = None
    with suppress(ValueError):
        config = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise InputError(f"model.path: {file} is not a JSON object")
    if "quantization_config" in config:
        raise InputError(f"model.path: {folder} is quantized; agcl needs unquantized weights")
    architecture = (config.get("architectures") or ["(none named in config.json)"])[0]
    try:
        family_named(str(architecture))
    except InputError as error:
        raise InputError(f"model.path: {folder}: {error}") from None
    if not any((folder / name).is_file() for name in _WEIGHTS):
        raise InputError(f"model.path: {folder} has no weights (expected model.safetensors)")
    if not any((folder / n).is_file() for n in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise InputError(f"model.path: {folder} has no tokenizer (expected tokenizer.json)")
    try:
        empty_model(folder)
    except Exception as error:  # A malformed value can make transformers raise anything.
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"model.path: cannot build a model from {file} ({reason})") from None
    return config


def empty_model(folder: Path) -> PreTrainedModel:
    """The folder's model on the meta device: parameter names and shapes without memory."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model
