"""Greedy exact match by one teacher-forced forward pass, and the loss on plain text."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from agcl import distributed
from agcl.batches import IGNORED, Batch, collate, in_order, targets
from agcl.tasks import Encoded, Rows

Precision = Literal["float32", "bfloat16"]
_WINDOW, _WINDOWS = 512, 4
"""Tokens a window of text, and windows a forward pass."""


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


def exact_match(
    model: PreTrainedModel,
    rows: Rows,
    *,
    batch_size: int,
    precision: Precision = "float32",
) -> list[bool]:
    """Exact-match verdict of every row, in row order, the same list on every worker."""
    predicted = predict(model, rows, batch_size=batch_size, precision=precision)
    return [ids == rows[i].input_ids[rows[i].prompt_tokens :] for i, ids in enumerate(predicted)]


@torch.no_grad()
def predict(
    model: PreTrainedModel,
    rows: Rows,
    *,
    batch_size: int,
    precision: Precision = "float32",
) -> list[list[int]]:
    """Arg-max token at every answer token of every row, teacher-forced, the same on every worker.

    Equal to the answer where greedy decoding would give it (see `answered_correctly`); from the
    first wrong token on, what the model would say had it been right until there. Batches do not
    depend on the number of workers: each worker takes whole ones in turn.
    """
    was_training = model.training
    model.eval()
    device = model.device
    encoded = (rows[i] for i in range(len(rows)))
    lengths = [len(row.input_ids) - row.prompt_tokens for row in encoded]
    predicted = torch.zeros(len(rows), max(lengths, default=0), dtype=torch.int32, device=device)
    batches = in_order(len(rows), batch_size)
    for indices in batches[distributed.rank() :: distributed.world_size()]:
        batch = collate([rows[i] for i in indices]).to(device)
        with autocast(device, precision):
            logits = model(batch.input_ids, use_cache=False).logits
        chosen = logits[:, :-1].argmax(-1).to(torch.int32)
        for i, row, expected in zip(indices, chosen, targets(batch), strict=True):
            predicted[i, : lengths[i]] = row[expected != IGNORED]
    distributed.sum_in_place([predicted])
    model.train(was_training)
    return [ids[:length] for ids, length in zip(predicted.tolist(), lengths, strict=True)]


@torch.no_grad()
def text_loss(
    model: PreTrainedModel, token_ids: Sequence[int], *, precision: Precision = "float32"
) -> float:
    """Mean negative log-likelihood of a text's tokens, in nats, the same on every worker.

    The text is cut into windows of 512 tokens (or what the model takes), each read on its own; the
    first token of each is not scored. Raises `ValueError` for a text of less than two tokens.
    """
    size = min(_WINDOW, model.config.max_position_embeddings)
    windows = [Encoded(list(token_ids[i : i + size]), 1) for i in range(0, len(token_ids), size)]
    windows = [window for window in windows if len(window.input_ids) > 1]
    if not windows:
        raise ValueError(f"a text of {len(token_ids)} tokens has nothing to predict")
    was_training = model.training
    model.eval()
    total = torch.zeros(len(windows), dtype=torch.float64, device=model.device)
    batches = in_order(len(windows), _WINDOWS)
    for indices in batches[distributed.rank() :: distributed.world_size()]:
        batch = collate([windows[i] for i in indices]).to(model.device)
        with autocast(model.device, precision):
            logits = model(batch.input_ids, use_cache=False).logits
        losses = cross_entropy(
            logits[:, :-1].transpose(1, 2).float(),
            targets(batch),
            ignore_index=IGNORED,
            reduction="none",
        )
        total[indices] = losses.double().sum(dim=1)
    distributed.sum_in_place([total])
    model.train(was_training)
    return float(total.sum()) / sum(len(window.input_ids) - 1 for window in windows)
