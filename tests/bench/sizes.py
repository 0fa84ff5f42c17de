"""`PYTHONPATH=tests python -m bench.sizes`: the table of predicted memory in `agcl/SPEED.md`."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.config import loading
from pipeline.estimate.disk import disk_per_task
from pipeline.estimate.fitting import fits, remedy
from pipeline.estimate.memory import peaks
from pipeline.estimate.setting import RowLength, Setting, total
from pipeline.estimate.shape import Shape, shape_of

_COMMON = {"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072}
LLAMAS = {
    "Llama-3.2-1B": {
        **_COMMON,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "tie_word_embeddings": True,
    },
    "Llama-3.2-3B": {
        **_COMMON,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
    "Llama-3.1-8B": {
        **_COMMON,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
}
METHODS = ("sequential", "agcl", "lora_agcl")
HALF = " in bfloat16"
"""Behind a method's name: with `model.dtype: bfloat16`."""
NF4 = ", base in 4 bits"
"""Behind that: with `model.quantization: nf4`, the adapter not merged."""
GPUS = {"24 GB": (24, 1), "80 GB": (80, 1), "8 x 80 GB": (80, 8)}
ROW = RowLength(tokens=512, answer=256)
_GB = 10**9


def shape_named(name: str) -> Shape:
    """The shape of one of `LLAMAS`."""
    with torch.device("meta"):
        return shape_of(LlamaForCausalLM(LlamaConfig(**LLAMAS[name])))


def setting_of(shape: Shape, method: str, workers: int = 1) -> Setting:
    """A method at its defaults in bfloat16 autocast, on GPUs; several workers share the model."""
    method, half, bits = method.partition(HALF)
    settings: dict[str, dict[str, Any]] = {
        "training": {"precision": "bfloat16"},
        "evaluation": {"precision": "bfloat16", "batch_size": 16},
        "resources": {"num_workers": workers, "gpus_per_worker": 1, "shard_model": workers > 1},
    }
    if half:
        settings["model"] = {"path": "given", "dtype": "bfloat16"}
    if bits:
        settings["model"]["quantization"] = "nf4"
        settings["adapter"] = {"merge": False}
        settings["resources"]["shard_model"] = False
    config = loading.validate(loading.with_preset(method, settings))
    return Setting(shape, config, ROW)


def table() -> str:
    """The table in Markdown."""
    lines = [
        f"| model, method | train | attribute | evaluate | disk | {' | '.join(GPUS)} |",
        f"|{' --- |' * (5 + len(GPUS))}",
    ]
    for name in LLAMAS:
        shape = shape_named(name)
        halves = [METHODS[1] + HALF, METHODS[2] + HALF, METHODS[2] + HALF + NF4]
        for method in (*METHODS, *halves):
            lines.append(_line(name, method, shape))
    return "\n".join(lines)


def _line(name: str, method: str, shape: Shape) -> str:
    setting = setting_of(shape, method)
    needed = {kind: total(parts, on_gpu=True) for kind, parts in peaks(setting).items()}
    sizes = [f"{needed[k] / _GB:.0f}" if k in needed else "" for k in ("train", "attribute")]
    kept = sum(part.size for part in disk_per_task(setting) if part.name != "checkpoint")
    cells = [_verdict(setting_of(shape, method, n), gb * _GB) for gb, n in GPUS.values()]
    plain, half, bits = method.partition(HALF)
    sizes += [f"{needed['evaluate'] / _GB:.0f}", f"{kept / _GB:.1f}"]
    row = [f"{name}, `{plain}`{half}{bits}", *sizes]
    return f"| {' | '.join([*row, *cells])} |"


def _verdict(setting: Setting, memory: int) -> str:
    """Yes, what to set for it, or which stages do not fit whatever is set on as many GPUs."""
    changes, lacking = [], []
    for kind in peaks(setting):
        if fits(setting, kind, memory):
            continue
        said = remedy(setting, kind, memory)
        if said is None or "method=" in said or "num_workers" in said:
            lacking.append(kind)
        else:
            changes += [f"`{each}`" for each in said.split()]
    if lacking:
        return f"no: {', '.join(lacking)}"
    return ", ".join(changes) or "yes"


if __name__ == "__main__":
    print(table())
