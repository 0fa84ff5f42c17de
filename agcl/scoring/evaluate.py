"""Greedy exact match in one teacher-forced forward pass, and the loss on plain text."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from agcl.model.forward import Precision, answer_logits, autocast
from agcl.parallel import distributed
from agcl.tasks import Encoded, Rows
from agcl.tasks.batches import Batch, answer_places, answer_tokens, by_length, collate, in_order

_WINDOW_TOKENS, _WINDOW_BATCH_SIZE = 512, 4
"""Tokens per window of text, and windows per forward pass."""


def answered_correctly(logits: Tensor, batch: Batch) -> Tensor:
    """Whether greedy decoding would produce exactly the answer and its end token, (rows,) bool.

    `logits` are those of `answer_logits`.
    """
    # Greedy decoding emits the argmax token by token. If all teacher-forced argmaxes equal the
    # answer, decoding sees the same prefixes and emits the same tokens; otherwise it leaves the
    # answer at the first difference. Both give the same verdict.
    places = answer_places(batch)
    hit = torch.ones_like(places)
    hit[places] = logits.argmax(-1) == answer_tokens(batch)
    return hit.all(dim=1)


@torch.no_grad()
def predict(
    model: PreTrainedModel,
    rows: Rows,
    *,
    batch_size: int,
    precision: Precision = "float32",
) -> list[list[int]]:
    """Teacher-forced argmax token for every answer token of every row.

    Equals the answer exactly if greedy decoding would produce it (see `answered_correctly`). After
    a wrong token, later predictions still see the correct prefix. Rows of similar length share a
    batch; batches do not depend on the number of ranks. Collective: same result on every rank.
    """
    sizes = [(len(row.input_ids), row.prompt_tokens) for row in (rows[i] for i in range(len(rows)))]
    lengths = [length - prompt_tokens for length, prompt_tokens in sizes]
    shape = len(rows), max(lengths, default=0)
    predicted = torch.zeros(shape, dtype=torch.int32, device=model.device)
    batches = by_length([length for length, _ in sizes], batch_size)
    for indices, _, logits in _passes(model, rows, batches, precision):
        per_row = logits.argmax(-1).to(torch.int32).split([lengths[i] for i in indices])
        for i, tokens in zip(indices, per_row, strict=True):
            predicted[i, : lengths[i]] = tokens
    distributed.sum_in_place([predicted])
    return [ids[:length] for ids, length in zip(predicted.tolist(), lengths, strict=True)]


@torch.no_grad()
def text_loss(
    model: PreTrainedModel, token_ids: Sequence[int], *, precision: Precision = "float32"
) -> float:
    """Mean negative log-likelihood of a text's tokens, in nats per token.

    The text is split into independent windows of 512 tokens (or the model's maximum); the first
    token of each is not scored. Collective: same result on every rank. Raises `ValueError` for a
    text of fewer than two tokens.
    """
    size = min(_WINDOW_TOKENS, model.config.max_position_embeddings)
    windows = [Encoded(list(token_ids[i : i + size]), 1) for i in range(0, len(token_ids), size)]
    windows = [window for window in windows if len(window.input_ids) > 1]
    if not windows:
        raise ValueError(f"a text of {len(token_ids)} tokens has nothing to predict")
    total = torch.zeros(len(windows), dtype=torch.float64, device=model.device)
    batches = in_order(len(windows), _WINDOW_BATCH_SIZE)
    for indices, batch, logits in _passes(model, windows, batches, precision):
        losses = cross_entropy(logits.float(), answer_tokens(batch), reduction="none").double()
        rows = answer_places(batch).nonzero()[:, 0]
        total[indices] = total.new_zeros(len(indices)).index_add(0, rows, losses)
    distributed.sum_in_place([total])
    return float(total.sum()) / sum(len(window.input_ids) - 1 for window in windows)


def _passes(
    model: PreTrainedModel, rows: Rows, batches: Sequence[list[int]], precision: Precision
) -> Iterator[tuple[list[int], Batch, Tensor]]:
    """This rank's batches in eval mode: row indices, batch and the logits of its answer tokens."""
    was_training = model.training
    model.eval()
    for number, counts in distributed.in_turn(len(batches)):
        batch = collate([rows[i] for i in batches[number]]).to(model.device)
        with autocast(model.device, precision):
            logits = answer_logits(model, batch)
        if counts:
            yield batches[number], batch, logits
    model.train(was_training)
