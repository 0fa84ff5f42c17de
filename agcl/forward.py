"""One forward pass: its precision, and logits only where they are looked at."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from agcl.batches import Batch, answer_places

Precision = Literal["float32", "bfloat16"]


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """The context of a forward pass in a precision; weights stay as they are."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


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
