"""One batch of attribution: its passes, and which rows and tokens of it count."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from agcl.attribution.collector import Collector, Selection
from agcl.attribution.inputs import InputMoment, MomentWeighting
from agcl.model.forward import Precision, answer_logits, autocast
from agcl.scoring.evaluate import answered_correctly
from agcl.tasks.batches import Batch, answer_places, answer_tokens


def like(model: PreTrainedModel) -> Tensor:
    """An empty tensor of what sums are kept in: float32, or float64 for a float64 model."""
    dtype = torch.promote_types(model.dtype, torch.float32)
    return torch.empty(0, dtype=dtype, device=model.device)


def attribute_batch(
    model: PreTrainedModel,
    batch: Batch,
    collectors: Sequence[Collector],
    inputs: Sequence[InputMoment],
    *,
    target: Callable[[Tensor], Tensor] | None,
    weighting: MomentWeighting | None,
    correct_only: bool,
    precision: Precision,
) -> Tensor:
    """Run a batch forward and, with a `target`, backward. Returns (rows seen, rows attributed).

    Raises `ValueError` for a packed batch, whose lines would count as single rows.
    """
    if batch.position_ids is not None:
        raise ValueError(
            "a packed batch cannot be attributed: its lines hold several rows; use collate"
        )
    keep = torch.ones_like(batch.lengths, dtype=torch.bool)
    selection = _select(batch, keep, weighting)
    # Without a backward pass, forward hooks add inputs immediately, unless `correct_only` needs the
    # logits first to select rows.
    ahead = target is None and not correct_only
    for each in inputs:
        each.tokens = selection.tokens if ahead else None
    with autocast(model.device, precision if model.dtype == torch.float32 else "float32"):
        logits = answer_logits(model, batch)
    if correct_only:
        keep = answered_correctly(logits, batch)
        selection = _select(batch, keep, weighting)
    for collector in collectors:
        collector.start(selection)
    if len(selection.rows) and target:
        values = target(logits.to(like(model).dtype))
        of_answers = values.gather(-1, answer_tokens(batch).unsqueeze(-1)).squeeze(-1)
        of_answers[keep[answer_places(batch).nonzero()[:, 0]]].sum().backward()
    for each in inputs:
        each.tokens = selection.tokens
        each.add()
    return torch.tensor([len(keep), len(selection.rows)], device=keep.device)


def _select(batch: Batch, keep: Tensor, weighting: MomentWeighting | None) -> Selection:
    """Select the rows in the mask `keep` and the tokens that count toward moments."""
    positions = torch.arange(batch.input_ids.shape[1], device=keep.device)
    # Exclude padding, and each row's last token, which predicts nothing.
    counted = (positions < batch.lengths.unsqueeze(1) - 1) & keep.unsqueeze(1)
    if weighting == "answer":
        counted[:, :-1] &= answer_places(batch)
    return Selection(keep.nonzero().squeeze(1), counted.flatten().nonzero().squeeze(1))
