"""Greedy exact match by one teacher-forced forward pass."""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from agcl import distributed
from agcl.batches import IGNORED, Batch, collate, in_order, targets
from agcl.tasks import Rows

Precision = Literal["float32", "bfloat16"]


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """The context of a forward pass in a precision; weights stay as they are."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def answered_correctly(logits: Tensor, batch: Batch) -> Tensor:
    """Whether greedy decoding would produce exactly the answer and its end, (rows,) bool.

    Greedy decoding emits the arg-max token by token. If every arg-max of a teacher-forced pass
    equals the answer's token, decoding sees the same prefixes and emits the same tokens; if one
    differs, decoding departs from the answer there. So the verdicts agree.
    """
    expected = targets(batch)
    hit = (logits[:, :-1].argmax(-1) == expected) | (expected == IGNORED)
    return hit.all(dim=1)


@torch.no_grad()
def exact_match(
    model: PreTrainedModel,
    rows: Rows,
    *,
    batch_size: int,
    precision: Precision = "float32",
) -> list[bool]:
    """Exact-match verdict of every row, in row order, the same list on every worker.

    Batches do not depend on the number of workers: each worker takes whole ones in turn.
    """
    was_training = model.training
    model.eval()
    device = model.device
    verdicts = torch.zeros(len(rows), dtype=torch.uint8, device=device)
    batches = in_order(len(rows), batch_size)
    for indices in batches[distributed.rank() :: distributed.world_size()]:
        batch = collate([rows[i] for i in indices]).to(device)
        with autocast(device, precision):
            logits = model(batch.input_ids, use_cache=False).logits
        verdicts[indices] = answered_correctly(logits, batch).to(torch.uint8)
    distributed.sum_in_place([verdicts])
    model.train(was_training)
    return verdicts.bool().tolist()
