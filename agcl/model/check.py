"""Checks of a model folder before its weights are loaded."""

import json
from contextlib import suppress
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from agcl.errors import InputError, one_line
from agcl.files.pointers import check_pulled
from agcl.lrp.families import family_named
from agcl.model.models import empty_model, load_tokenizer, open_model

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def check_folder(folder: Path, *, weights: bool = True) -> PreTrainedTokenizerBase:
    """Check a model folder without loading weights; return its tokenizer.

    Raises `InputError` naming the folder or file and what is missing or unsupported. With `weights`
    false, a folder without any is fine; those that are there are checked.
    """
    _check_config(folder)
    try:
        embedded = empty_model(folder).get_input_embeddings().num_embeddings
    except Exception as error:  # A malformed value can make transformers raise anything.
        reason = one_line(error, 200)
        raise InputError(f"cannot build a model from {folder}/config.json ({reason})") from None
    if weights or has_weights(folder):
        _check_weights(folder)
    if not any((folder / n).is_file() for n in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise InputError(f"{folder} has no tokenizer (expected tokenizer.json)")
    tokenizer = load_tokenizer(folder)
    # A pad token beyond the embedding is common and does no harm: rows do not have it.
    unused = set(tokenizer.all_special_ids) - {tokenizer.eos_token_id, tokenizer.bos_token_id}
    if (needed := max({*tokenizer.get_vocab().values()} - unused) + 1) > embedded:
        raise InputError(
            f"the tokenizer in {folder} has {needed} tokens, the model embeds only {embedded}"
        )
    return tokenizer


def _check_config(folder: Path) -> None:
    """Check that `config.json` names a supported model, before transformers reads it."""
    file = folder / "config.json"
    if not folder.is_dir():
        raise InputError(f"no folder {folder}")
    if not file.is_file():
        raise InputError(f"{folder} has no config.json")
    for each in sorted(folder.iterdir()):
        if each.suffix in (".json", ".jinja", ".model", ".txt"):
            check_pulled(each)
    config = None
    with suppress(ValueError):
        config = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise InputError(f"{file} is not a JSON object")
    if "quantization_config" in config:
        raise InputError(f"{folder} is quantized; agcl needs unquantized weights")
    architecture = (config.get("architectures") or ["(none named in config.json)"])[0]
    try:
        family_named(str(architecture))
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None


def has_weights(folder: Path) -> bool:
    """Whether a model folder names weights that agcl opens; they may be incomplete."""
    return any((folder / name).is_file() for name in _WEIGHTS)


def _check_weights(folder: Path) -> None:
    """Check that the weight files are there and hold every parameter; reads their headers only."""
    single, index = (folder / name for name in _WEIGHTS)
    if not has_weights(folder):
        raise InputError(f"{folder} has no weights (expected {single.name})")
    try:
        files = [single]
        if not single.is_file():
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            files = [folder / name for name in sorted(set(shards))]
        for file in files:
            check_pulled(file)
            if not file.is_file():
                raise InputError(
                    f"{file}, named in {index.name}, is missing or a link that leads nowhere"
                )
        open_model(folder, "meta")
    except InputError:
        raise
    except Exception as error:  # A damaged file can make transformers raise anything.
        raise InputError(f"cannot read the weights in {folder} ({one_line(error, 200)})") from None
