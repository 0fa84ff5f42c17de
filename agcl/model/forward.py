"""Forward passes: precision, checkpointing, compilation, and logits of answer tokens only."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo_config
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from agcl.errors import InputError
from agcl.tasks.batches import Batch, answer_places

Precision = Literal["float32", "bfloat16"]
_RECOMPILE_LIMIT = 64
"""Variants of a compiled layer: trainable parameters, mask type, batch of one. Beyond torch's
default limit of 8 it silently falls back to eager."""


def autocast(device: torch.device, precision: Precision, *, cache: bool = False) -> torch.autocast:
    """Context for a forward pass in the given precision; weights keep their dtype.

    `cache` keeps the bfloat16 copies of trainable weights until the context ends: for many passes.
    """
    # A single pass casts each weight once anyway, and the cache would hold all copies at a time.
    on = precision == "bfloat16"
    return torch.autocast(device.type, torch.bfloat16, enabled=on, cache_enabled=cache)


def cpu_has_bfloat16() -> bool:
    """Whether oneDNN multiplies bfloat16 matrices on this CPU, as autocast takes for granted."""
    available = torch.backends.mkldnn.is_available()
    return available and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@contextmanager
def fast_products(precision: Precision) -> Iterator[None]:
    """With `bfloat16`, round the factors of float32 matrix products: to TF32, on a CPU to bfloat16.

    Products are summed in float32. No effect on hardware that has no faster way. With `float32`
    nothing is rounded, not to TF32 either.
    """
    backends: Any = torch.backends
    settings = [backends.cuda.matmul, backends.mkldnn.matmul]
    before = [each.fp32_precision for each in settings]
    if precision == "bfloat16":
        for each, value in zip(settings, ("tf32", "bf16"), strict=True):
            each.fp32_precision = value
    try:
        yield
    finally:
        for each, value in zip(settings, before, strict=True):
            each.fp32_precision = value


@contextmanager
def activation_checkpointing(model: PreTrainedModel, on: bool = True) -> Iterator[None]:
    """Recompute each layer's activations in the backward pass instead of storing them.

    Holds the activations of one layer at a time, at the cost of a second forward pass. On a CPU
    gradients are bit-identical, dropout included (Chen 2016, "Training deep nets with sublinear
    memory cost"). Raises `ValueError` for a model that does not support it.
    """
    if on:
        model.activation_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        if on:
            model.activation_checkpointing_disable()


@contextmanager
def compiled(
    model: PreTrainedModel, on: bool = True, *, backend: str = "inductor"
) -> Iterator[None]:
    """Run the model's layers through `torch.compile`, with dynamic shapes.

    Layers are compiled one by one, so that identical layers share one compilation; embeddings,
    mask and head stay eager. Results agree up to rounding. Raises `InputError` if compiling fails.
    """
    layers = [m for m in model.modules() if on and isinstance(m, GradientCheckpointingLayer)]
    for layer in layers:
        layer.compile(dynamic=True, backend=backend)
    try:
        with dynamo_config.patch(recompile_limit=_RECOMPILE_LIMIT):
            yield
    except BackendCompilerFailed as error:
        raise InputError(
            f"torch.compile failed; it needs a C++ compiler (g++ or $CXX): {error.inner_exception}"
        ) from error
    finally:
        for layer in layers:
            layer._compiled_call_impl = None


@contextmanager
def head_at(model: PreTrainedModel, places: Tensor) -> Iterator[None]:
    """Apply the output head to some positions only: logits become (1, positions, vocabulary).

    `places` is a mask, (lines, tokens) bool.
    """
    # With a large vocabulary the head is a fifth of a small model's weights, and logits for all
    # positions would be the largest tensor of the pass.

    def keep(head: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][places].unsqueeze(0), *args[1:])

    head = cast(nn.Module, model.get_output_embeddings())
    with head.register_forward_pre_hook(cast(Any, keep)):
        yield


@contextmanager
def any_dtype_attention(model: PreTrainedModel) -> Iterator[None]:
    """Within it flash attention, which takes no float32, is replaced by torch's or by eager."""
    before = model.config._attn_implementation
    is_flash = "flash" in (before or "")  # Also a kernel from the hub.
    if is_flash:
        model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    try:
        yield
    finally:
        if is_flash:
            model.set_attn_implementation(before)


def answer_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Logits that predict the answer tokens, (answer tokens, vocabulary), row by row."""
    with head_at(model, pad(answer_places(batch), (0, 1))):
        output = model(batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    return cast(Tensor, output.logits).squeeze(0)
