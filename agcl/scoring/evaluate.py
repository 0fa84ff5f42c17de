"""Greedy exact match by one teacher-forced forward pass, and the loss on plain text."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from agcl.model.forward import Precision, answer_logits, autocast
from agcl.parallel import distributed
from agcl.tasks import Encoded, Rows
from agcl.tasks.batches import Batch, answer_places, answer_tokens, by_length, collate, in_order

_WINDOW, _WINDOWS = 512, 4
"""Tokens a window of text, and windows a forward pass."""


def answered_correctly(logits: Tensor, batch: Batch) -> Tensor:
    """Whether greedy decoding would produce exactly the answer and its end, (rows,) bool.

    `logits` are those of `answer_logits`. Greedy decoding emits the arg-max token by token. If
    every arg-max of a teacher-forced pass equals the answer's token, decoding sees the same
    prefixes and emits the same tokens; if one differs, decoding departs from the answer there. So
    the verdicts agree.
    """
    places = answer_places(batch)
    hit = torch.ones_like(places)
    hit[places] = logits.argmax(-1) == answer_tokens(batch)
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
    first wrong token on, what the model would say had it been right until there. Rows of like
    length share a batch; batches do not depend on the number of workers: each takes whole ones in
    turn.
    """
    was_training = model.training
    model.eval()
    device = model.device
    sizes = [(len(row.input_ids), row.prompt_tokens) for row in (rows[i] for i in range(len(rows)))]
    lengths = [length - prompt_tokens for length, prompt_tokens in sizes]
    predicted = torch.zeros(len(rows), max(lengths, default=0), dtype=torch.int32, device=device)
    batches = by_length([length for length, _ in sizes], batch_size)
    for number, counts in distributed.in_turn(len(batches)):
        indices = batches[number]
        batch = collate([rows[i] for i in indices]).to(device)
        with autocast(device, precision):
            logits = answer_logits(model, batch)
        chosen = logits.argmax(-1).to(torch.int32).split([lengths[i] for i in indices])
        for i, tokens in zip(indices, chosen, strict=True) if counts else ():
            predicted[i, : lengths[i]] = tokens
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
    for number, counts in distributed.in_turn(len(batches)):
        indices = batches[number]
        batch = collate([windows[i] for i in indices]).to(model.device)
        with autocast(model.device, precision):
            logits = answer_logits(model, batch)
        losses = cross_entropy(logits.float(), answer_tokens(batch), reduction="none").double()
        rows = answer_places(batch).nonzero()[:, 0]
        if counts:
            total[indices] = total.new_zeros(len(indices)).index_add(0, rows, losses)
    distributed.sum_in_place([total])
    model.train(was_training)
    return float(total.sum()) / sum(len(window.input_ids) - 1 for window in windows)
