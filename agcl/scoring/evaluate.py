"""Teacher-forced passes: greedy exact match, loss on plain text, divergence from a base model."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import PreTrainedModel

from agcl.model import adapter
from agcl.model.forward import Precision, answer_logits, autocast
from agcl.parallel import distributed
from agcl.tasks import Encoded, Rows
from agcl.tasks.batches import Batch, answer_places, answer_tokens, by_length, collate

_WINDOW_TOKENS = 512
"""Tokens per window of a text."""
PASS_TOKENS, PASS_ANSWERS, LOGITS_TOKENS = 2048, 512, 128
"""Limits for text losses and divergences: tokens and answer tokens per forward pass, and tokens
whose logits are compared at a time. A row above a limit gets a separate pass."""


def answered_correctly(logits: Tensor, batch: Batch) -> Tensor:
    """Whether greedy decoding would produce exactly the answer and its end token, (rows,) bool.

    Of a conversation with several answers the last one counts, as it does in scores. `logits` are
    those of `answer_logits`.
    """
    # Greedy decoding emits the argmax token by token. If all teacher-forced argmaxes equal the
    # answer, decoding sees the same prefixes and emits the same tokens; otherwise it leaves the
    # answer at the first difference. Both give the same verdict.
    places = answer_places(batch)
    hit = torch.ones_like(places)
    hit[places] = logits.argmax(-1) == answer_tokens(batch)
    behind = places.flip(1)
    between = ~behind & (behind.cumsum(1) > 0)  # What is not learned, before the last answer.
    earlier = (between.cumsum(1) > 0).flip(1)
    return (hit | earlier).all(dim=1)


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
    for number, _, logits, _ in _passes(model, rows, batches, precision):
        indices = batches[number]
        per_row = logits.argmax(-1).to(torch.int32).split([lengths[i] for i in indices])
        for i, tokens in zip(indices, per_row, strict=True):
            predicted[i, : lengths[i]] = tokens
        del logits
    distributed.sum_in_place([predicted])
    return [ids[:length] for ids, length in zip(predicted.tolist(), lengths, strict=True)]


def text_loss(
    model: PreTrainedModel,
    token_ids: Sequence[int],
    *,
    start: int | None = None,
    precision: Precision = "float32",
) -> float:
    """Mean negative log-likelihood of a text's tokens, in nats per token.

    The text is split into independent windows of 512 tokens (or the model's maximum). With `start`,
    such as BOS, each begins with that token, otherwise its first token is not scored. Collective:
    same result on every rank. Raises `ValueError` for a text without a token to score.
    """
    return _means(model, None, _windows(model, token_ids, start), precision)[0]


def text_loss_and_kl(
    model: PreTrainedModel,
    base: PreTrainedModel,
    token_ids: Sequence[int],
    *,
    start: int | None = None,
    precision: Precision = "float32",
) -> tuple[float, float]:
    """`text_loss`, and on the same tokens the mean KL(base || model), in nats per token.

    The forward KL divergence, from the base model's distribution over the next token to the
    model's (RL's Razor, Shenfeld et al. 2025, arXiv 2509.04259). If `base` is `model` itself, its
    LoRA adapter is disabled for the base's forward passes.
    """
    return _means(model, base, _windows(model, token_ids, start), precision)


def answer_kl(
    model: PreTrainedModel, base: PreTrainedModel, rows: Rows, *, precision: Precision = "float32"
) -> float:
    """Mean KL(base || model) over the rows' answer tokens, in nats per token.

    Teacher-forced: both models see the prompt and the answer so far. See `text_loss_and_kl`.
    Collective: same result on every rank. Raises `ValueError` without rows.
    """
    return _means(model, base, rows, precision)[1]


def _windows(model: PreTrainedModel, token_ids: Sequence[int], start: int | None) -> list[Encoded]:
    first = [] if start is None else [start]
    size = min(_WINDOW_TOKENS, model.config.max_position_embeddings) - len(first)
    windows = [
        Encoded([*first, *token_ids[i : i + size]], 1) for i in range(0, len(token_ids), size)
    ]
    windows = [window for window in windows if len(window.input_ids) > 1]
    if not windows:
        raise ValueError(f"a text of {len(token_ids)} tokens has nothing to predict")
    return windows


@torch.no_grad()
def _means(
    model: PreTrainedModel, base: PreTrainedModel | None, rows: Rows, precision: Precision
) -> tuple[float, float]:
    """Mean negative log-likelihood and, with a `base`, KL(base || model) of the answer tokens."""
    sizes = [(len(row.input_ids), row.prompt_tokens) for row in (rows[i] for i in range(len(rows)))]
    answer_lengths = [length - max(1, prompt_tokens) for length, prompt_tokens in sizes]
    if not sum(answer_lengths):
        raise ValueError("no rows, so there is no answer token to compare")
    batches = _small([length for length, _ in sizes], answer_lengths)
    # By batch, so that the sums do not depend on the number of ranks.
    totals = torch.zeros(2, len(batches), dtype=torch.float64, device=model.device)
    for number, batch, logits, of_base in _passes(model, rows, batches, precision, base):
        loss, kl = totals[:, number]
        expected = answer_tokens(batch)
        # A few tokens at a time: copies of all logits in float32 would be the largest tensors.
        for part in torch.arange(len(expected), device=expected.device).split(LOGITS_TOKENS):
            chances = logits[part].float().log_softmax(-1)
            loss -= chances.gather(-1, expected[part, None]).double().sum()
            if of_base is not None:
                by_base = of_base[part].float().log_softmax(-1)
                each = kl_div(chances, by_base, reduction="none", log_target=True)
                kl += each.sum(-1).double().sum()
        del logits, of_base
    distributed.sum_in_place([totals])
    loss, kl = (totals.sum(1) / sum(answer_lengths)).tolist()
    return loss, kl


def _small(lengths: Sequence[int], answer_lengths: Sequence[int]) -> list[list[int]]:
    """Row indices of batches of similar length with few tokens, padding included; at least one row.

    Such batches bound memory whatever batch size was chosen for other passes.
    """
    batches: list[list[int]] = []
    answers = 0
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        answers += answer_lengths[i]
        tokens = lengths[i] * (len(batches[-1]) + 1 if batches else 1)
        if not batches or answers > PASS_ANSWERS or tokens > PASS_TOKENS:
            batches.append([])
            answers = answer_lengths[i]
        batches[-1].append(i)
    return batches


def _passes(
    model: PreTrainedModel,
    rows: Rows,
    batches: Sequence[list[int]],
    precision: Precision,
    base: PreTrainedModel | None = None,
) -> Iterator[tuple[int, Batch, Tensor, Tensor | None]]:
    """Run this rank's share of the batches in eval mode.

    Yields (batch number, batch, logits of its answer tokens, those of the `base` if given).
    """
    was_training = {each: each.training for each in (base, model) if each is not None}
    for each in was_training:
        each.eval()
    for number, counts in distributed.in_turn(len(batches)):
        # Of a conversation only the last turn is scored.
        last_turns = [rows[i]._replace(earlier=()) for i in batches[number]]
        batch = collate(last_turns).to(model.device)
        of_base = None
        with autocast(model.device, precision):
            if base is not None:
                with adapter.disabled(model) if base is model else nullcontext():
                    of_base = answer_logits(base, batch)
            logits = answer_logits(model, batch)
        if counts:
            yield number, batch, logits, of_base
        del logits, of_base  # Before those of the next pass, which are as large.
    for each, training in was_training.items():
        each.train(training)
