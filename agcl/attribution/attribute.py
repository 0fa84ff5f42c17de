"""Relevance of every weight for a task's right answers, streamed over samples and workers."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from agcl.attribution.collector import Chosen, Collector, Estimator, MomentWeighting
from agcl.importance import Importance
from agcl.lrp import RuleSet, architecture_of, attributed_linears, relevance_backward, weight_of
from agcl.model.forward import Precision, answer_logits
from agcl.parallel import distributed, sharding
from agcl.scoring.evaluate import answered_correctly
from agcl.tasks.batches import Batch, answer_places, answer_tokens

Split = Literal["samples", "layers"]
"""What the workers share among them."""


class NothingToAttribute(ValueError):
    """The model answers no row correctly, so there is no right answer to attribute."""


def attribute(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    *,
    estimator: Estimator = "lrp",
    top_k: int | None = 4,
    rules: RuleSet = "attnlrp",
    moments: MomentWeighting | None = None,
    unit_inputs: bool = True,
    entries: bool = True,
    correct_only: bool = True,
    split: Split = "samples",
    running_values: Precision = "float32",
    log: Callable[[int], None] = lambda rows_done: None,
) -> Importance:
    """Attribute the answers of all workers' batches to the weights of the linear layers.

    With `split` by `samples` every worker gives batches of its own and keeps running values of all
    layers, which are merged at the end; by `layers` all workers give the same batches and each
    keeps the running values of its share of the layers: K times the weights divided by the number
    of workers, and nothing to merge; a sharded model is always split so. With `running_values` in
    bfloat16 it is half of that, and each value that is kept is rounded once.

    A sample's target is the sum of its answer tokens' logits, teacher-forced. Its relevance of a
    weight, W ⊙ (gᵀx) divided by the relevance that flows through the layer, Σ|z ⊙ g|, enters the
    entry's `top_k` largest values (None: the plain mean over samples). With `moments`, also
    collect per layer Σ_t r_t x_t x_tᵀ over the samples' tokens, r_t = |Σ_j z_tj g_tj| scaled to
    mean 1 (`relevance`), 1 (`uniform`), or 1 on tokens that predict an answer token and 0 on others
    (`answer`). With `unit_inputs` every x_t is scaled to length 1, so that it counts by r_t alone:
    else a few tokens with massive activations (Sun 2024, arXiv 2402.17762) are all of a layer's
    moment.

    Without `entries` it is the moments alone that are collected, all that a projection needs: no
    products of single samples and no running values, and where tokens do not weigh by their
    relevance no backward pass.

    Other estimators use the ordinary gradient whatever `rules` says: `grad_x_param` in the same
    formula; `fisher` the mean over samples of (∂ log p(answer) / ∂W)², the diagonal of the
    empirical Fisher matrix at the given answers (EWC, Kirkpatrick 2017); `das` |tanh| of the mean
    gradient of log p(answer), standardised over the layer's entries (after DAS, Ke 2023). The
    last two ignore `top_k`.

    The result does not depend on batch size, order of rows or number of workers, up to rounding.
    Raises `NothingToAttribute` where `correct_only` leaves no sample, `ValueError` for a sharded
    model split by samples, and where neither entries nor moments are asked for.
    """
    by_relevance = estimator in ("lrp", "grad_x_param")
    rules = rules if estimator == "lrp" else "gradient"
    top_k = top_k if by_relevance else None
    target = _logits_of_answers if by_relevance else _log_likelihood
    linears = attributed_linears(model)
    own = _own(model, list(linears), split)
    collectors = {
        n: Collector(
            linears[n], estimator, top_k, moments, unit_inputs, running_values, entries=entries
        )
        for n in own
    }
    seen = used = 0
    backward = _needs_backward(moments, entries=entries)
    with torch.set_grad_enabled(backward), relevance_backward(model, rules):
        handles = [linears[n].register_forward_hook(collectors[n].hook) for n in own]
        try:
            for batch in batches:
                batch = batch.to(model.device)
                logits = answer_logits(model, batch)
                correct = answered_correctly(logits, batch) if correct_only else _all(batch)
                chosen = _chosen(batch, correct, moments)
                for collector in collectors.values():
                    collector.start(chosen)
                if len(chosen.rows) and backward:
                    target(logits, batch, correct).backward()
                seen += len(correct)
                used += len(chosen.rows)
                log(seen)
        finally:
            for handle in handles:
                handle.remove()
    counts = torch.tensor([seen, used], device=model.device)
    if split == "samples":
        distributed.sum_in_place([counts])
    if counts[1] == 0:
        raise NothingToAttribute(
            f"the model answers none of the {int(counts[0])} rows correctly: train longer, or set "
            "importance.correct_only to false"
        )
    for collector in collectors.values():
        collector.finish(merge=split == "samples")
    found = {n: c.entries() for n, c in collectors.items()} if entries else {}
    second = {n: c.second_moment() for n, c in collectors.items()} if moments else {}
    if split == "layers":
        shapes = {n: cast(Tensor, m.weight).shape for n, m in linears.items()} if entries else {}
        widths = {n: weight_of(m).shape[1] for n, m in linears.items()} if moments else {}
        found = _from_owners(found, shapes, model)
        second = _from_owners(second, {n: (w, w) for n, w in widths.items()}, model)
    return Importance(
        entries=found,
        moments=second,
        header={
            "architecture": architecture_of(model),
            "estimator": estimator,
            "rules": rules,
            "top_k": top_k,
            "running_values": running_values,
            "moments": moments,
            "unit_inputs": unit_inputs,
            "correct_only": correct_only,
            "rows": int(counts[0]),
            "rows_attributed": int(counts[1]),
        },
    )


def _needs_backward(moments: MomentWeighting | None, *, entries: bool) -> bool:
    if not (entries or moments):
        raise ValueError("neither entries nor moments: there is nothing to collect")
    return entries or moments == "relevance"


def _own(model: PreTrainedModel, layers: Sequence[str], split: Split) -> Sequence[str]:
    """The layers whose running values this worker keeps; by `layers` they are dealt in turn."""
    if split == "layers":
        return layers[distributed.rank() :: distributed.world_size()]
    if sharding.is_sharded(model):
        raise ValueError("a sharded model needs split by layers: all workers forward one batch")
    return layers


def _from_owners(
    own: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]], model: PreTrainedModel
) -> dict[str, Tensor]:
    """The tensor of every layer, on every worker, on the CPU: a device may not hold them all."""
    dtype = torch.promote_types(model.dtype, torch.float32)
    return {
        name: distributed.broadcast(
            own[name] if name in own else torch.empty(*shape, dtype=dtype, device=model.device),
            number % distributed.world_size(),
        ).cpu()
        for number, (name, shape) in enumerate(shapes.items())
    }


def _all(batch: Batch) -> Tensor:
    return torch.ones(len(batch.lengths), dtype=torch.bool, device=batch.lengths.device)


def _logits_of_answers(logits: Tensor, batch: Batch, chosen: Tensor) -> Tensor:
    """Sum over the chosen samples of their answer tokens' logits."""
    picked = logits.gather(-1, answer_tokens(batch).unsqueeze(-1)).squeeze(-1)
    rows = answer_places(batch).nonzero()[:, 0]
    return picked[chosen[rows]].sum()


def _log_likelihood(logits: Tensor, batch: Batch, chosen: Tensor) -> Tensor:
    """Sum over the chosen samples of the log-probability of their answer."""
    return _logits_of_answers(logits.log_softmax(-1), batch, chosen)


def _chosen(batch: Batch, correct: Tensor, weighting: MomentWeighting | None) -> Chosen:
    """The last token predicts nothing, and padding is no token."""
    places = torch.arange(batch.input_ids.shape[1], device=correct.device)
    real = (places < batch.lengths.unsqueeze(1) - 1) & correct.unsqueeze(1)
    if weighting == "answer":
        real[:, :-1] &= answer_places(batch)
    return Chosen(correct.nonzero().squeeze(1), real.flatten().nonzero().squeeze(1))
