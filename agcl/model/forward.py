"""One forward pass: its precision, and logits only where they are looked at."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo_config
from torch._dynamo.exc import BackendCompilerFailed
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from agcl.errors import InputError
from agcl.tasks.batches import Batch, answer_places

Precision = Literal["float32", "bfloat16"]
_VARIANTS = 64
"""Of a compiled layer: by what of it is trained, kind of mask, one line or more. Beyond torch's own
limit of 8 it would go on uncompiled."""


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """The context of a forward pass in a precision; weights stay as they are."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


@contextmanager
def quick_attention(model: PreTrainedModel, precision: Precision) -> Iterator[None]:
    """While training in bfloat16 on a CPU, compute attention in float32, which is faster there.

    For rows of up to 128 tokens the backward pass of torch's fused attention takes two to ten times
    as long in bfloat16 (torch 2.13), for longer ones as long. Other devices, and models that do not
    use torch's fused attention, are left alone.
    """
    before = model.config._attn_implementation
    if precision == "float32" or model.device.type != "cpu" or before != "sdpa":
        yield
        return
    fused = AttentionInterface()["sdpa"]

    def in_float32(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        with torch.autocast("cpu", enabled=False):
            return fused(module, query.float(), key.float(), value.float(), *args, **kwargs)

    AttentionInterface.register("agcl_float32", in_float32)
    AttentionMaskInterface.register("agcl_float32", AttentionMaskInterface()["sdpa"])
    model.set_attn_implementation("agcl_float32")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def activation_checkpointing(model: PreTrainedModel, on: bool = True) -> Iterator[None]:
    """While training, compute every layer's activations again in the backward pass.

    Memory for the activations of one layer in place of all of them, for another forward pass; the
    same gradients to the bit, dropout included (Chen 2016, "Training deep nets with sublinear
    memory cost"). Raises `ValueError` for a model whose layers cannot.
    """
    if not on:
        yield
        return
    model.activation_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        model.activation_checkpointing_disable()


@contextmanager
def compiled(
    model: PreTrainedModel, on: bool = True, *, backend: str = "inductor"
) -> Iterator[None]:
    """Run each of the model's layers through `torch.compile`, for any number of rows and tokens.

    Layer by layer, so that one compilation serves all that are alike, and the mask before them and
    the head behind them are as without. The same numbers to rounding. Raises `InputError` where
    torch cannot compile.
    """
    if not on:
        yield
        return
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    for layer in layers:
        layer.compile(dynamic=True, backend=backend)
    try:
        with dynamo_config.patch(recompile_limit=_VARIANTS):
            yield
    except BackendCompilerFailed as error:
        raise InputError(
            "training.compile: torch.compile failed, which needs a C++ compiler (g++, or CXX): "
            f"{error.inner_exception}"
        ) from error
    finally:
        for layer in layers:
            layer._compiled_call_impl = None


def answer_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The logits that predict the answers' tokens, (answer tokens, vocabulary), row after row.

    The head is applied to these positions alone. It has a fifth of the weights of a small model
    with a large vocabulary, and its logits would be the largest tensor of the pass.
    """
    places = answer_places(batch)

    def keep(head: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][:, :-1][places].unsqueeze(0), *args[1:])

    head = cast(nn.Module, model.get_output_embeddings())
    handle = head.register_forward_pre_hook(cast(Any, keep))
    try:
        logits: Tensor = model(
            batch.input_ids, position_ids=batch.position_ids, use_cache=False
        ).logits
    finally:
        handle.remove()
    return logits.squeeze(0)
