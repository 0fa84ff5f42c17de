"""One forward pass: its precision, and logits only where they are looked at."""

from contextlib import AbstractContextManager, nullcontext
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
        logits: Tensor = model(batch.input_ids, use_cache=False).logits
    finally:
        handle.remove()
    return logits.squeeze(0)
