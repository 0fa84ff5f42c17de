"""Relevance of every weight for a task's correct answers, streamed over samples and ranks."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Literal, cast, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from agcl.attribution.collector import Collector, Estimator, MomentWeighting, Selection
from agcl.importance import Importance
from agcl.lrp import RuleSet, attributed_linears, relevance_backward, weight_of
from agcl.lrp.families import architecture_of
from agcl.model.forward import Precision, answer_logits
from agcl.parallel import distributed, sharding
from agcl.scoring.evaluate import answered_correctly
from agcl.tasks.batches import Batch, answer_places, answer_tokens

Split = Literal["samples", "layers"]
"""How attribution is distributed over ranks."""


class NoCorrectAnswer(ValueError):
    """The model answers no row correctly, and only correct answers were asked for."""


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
    """Attribute the answers in all ranks' batches to the weights of the linear layers.

    Entries: a sample's target is the sum of its answer tokens' logits, teacher-forced. A weight's
    relevance is W ⊙ (gᵀx) divided by the relevance that flows through the layer, Σ|z ⊙ g|. Its
    `top_k` largest values over samples are averaged (None: mean over all samples). `entries=False`
    collects only moments, which is all a projection needs, and runs a backward pass only for
    `moments="relevance"`.

    Moments: per layer Σ_t r_t x_t x_tᵀ over the samples' tokens. r_t is |Σ_j z_tj g_tj| scaled to
    mean 1 (`relevance`), 1 (`uniform`), or 1 on tokens that predict an answer token and 0 on
    others (`answer`). With `unit_inputs` every x_t is scaled to length 1; otherwise a few tokens
    with massive activations (Sun 2024, arXiv 2402.17762) dominate a layer's moment.

    Other estimators use the ordinary gradient and ignore `rules`. `grad_x_param`: the same
    formula. `fisher`: mean over samples of (∂ log p(answer) / ∂W)², the diagonal of the empirical
    Fisher matrix at the given answers (EWC, Kirkpatrick 2017). `das`: |tanh| of the mean gradient
    of log p(answer), standardized over the layer's entries (after DAS, Ke 2023). The last two
    ignore `top_k`.

    `split="samples"`: every rank passes different batches and keeps running values for all
    layers, which are merged at the end. `split="layers"`, required for a sharded model: all ranks
    pass the same batches, and each keeps running values (`top_k` per weight) only for its share of
    the layers. `running_values="bfloat16"` halves their memory and rounds each value once.

    The result does not depend on batch size, row order or number of ranks, up to rounding. Raises
    `NoCorrectAnswer` if `correct_only` leaves no sample, and `ValueError` without batches, for an
    argument with another value than these, for a model in half precision or in a PEFT wrapper, for
    a sharded model split by samples, or if neither entries nor moments are requested.
    """
    _check_arguments(model, estimator, moments, split, top_k)
    backward = entries or moments == "relevance"
    if not (backward or moments):
        raise ValueError("nothing to collect: request entries, moments or both")
    by_relevance = estimator in ("lrp", "grad_x_param")
    rules = rules if estimator == "lrp" else "gradient"
    top_k = top_k if by_relevance else None
    linears = attributed_linears(model)
    collectors = {
        n: Collector(
            linears[n], estimator, top_k, moments, unit_inputs, running_values, entries=entries
        )
        for n in _layers_of_rank(model, list(linears), split)
    }
    seen = used = 0
    with torch.set_grad_enabled(backward), relevance_backward(model, rules), ExitStack() as hooks:
        for name, collector in collectors.items():
            hooks.enter_context(linears[name].register_forward_hook(collector.hook))
        for batch in batches:
            batch = batch.to(model.device)
            logits = answer_logits(model, batch)
            every = torch.ones_like(batch.lengths, dtype=torch.bool)
            keep = answered_correctly(logits, batch) if correct_only else every
            selection = _select(batch, keep, moments)
            for collector in collectors.values():
                collector.start(selection)
            if len(selection.rows) and backward:
                _target(logits, batch, keep, likelihood=not by_relevance).backward()
            seen += len(keep)
            used += len(selection.rows)
            log(seen)
    counts = torch.tensor([seen, used], device=model.device)
    if split == "samples":
        distributed.sum_in_place([counts])
    _check_counts(*counts.tolist())
    for collector in collectors.values():
        collector.finish(merge=split == "samples")
    relevances = {n: c.entries() for n, c in collectors.items()} if entries else {}
    second_moments = {n: c.second_moment() for n, c in collectors.items()} if moments else {}
    if split == "layers":
        shapes = {n: cast(Tensor, m.weight).shape for n, m in linears.items()} if entries else {}
        widths = {n: weight_of(m).shape[1] for n, m in linears.items()} if moments else {}
        relevances = _from_owners(relevances, shapes, model)
        second_moments = _from_owners(second_moments, {n: (w, w) for n, w in widths.items()}, model)
    return Importance(
        entries=relevances,
        moments=second_moments,
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


def _check_arguments(
    model: PreTrainedModel,
    estimator: Estimator,
    moments: MomentWeighting | None,
    split: Split,
    top_k: int | None,
) -> None:
    """Raise `ValueError` for an argument that would fail, or be ignored, later."""
    for name, value, allowed in (
        ("estimator", estimator, get_args(Estimator)),
        ("moments", moments, (*get_args(MomentWeighting), None)),
        ("split", split, get_args(Split)),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, not {value!r}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, or None for all samples, not {top_k}")
    check_precision(model)


def check_precision(model: PreTrainedModel) -> None:
    """Raise `ValueError` for a model in half precision."""
    if model.dtype in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"the model is in {model.dtype}, too coarse for relevance: load it with "
            "dtype=torch.float32"
        )


def _check_counts(seen: int, used: int) -> None:
    if not seen:
        raise ValueError("no batches to attribute; an iterator can be passed only once")
    if not used:
        raise NoCorrectAnswer(
            f"the model answers none of the {seen} rows correctly; with correct_only=False it is "
            "attributed on wrong answers too"
        )


def _layers_of_rank(model: PreTrainedModel, layers: Sequence[str], split: Split) -> Sequence[str]:
    """The layers whose running values this rank keeps; round-robin if split by `layers`."""
    if split == "layers":
        return layers[distributed.rank() :: distributed.world_size()]
    if sharding.is_sharded(model):
        raise ValueError("a sharded model must be split by layers: all ranks share each batch")
    return layers


def _from_owners(
    own: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]], model: PreTrainedModel
) -> dict[str, Tensor]:
    """Every layer's tensor on every rank. On the CPU, since a device may not hold them all."""
    dtype = torch.promote_types(model.dtype, torch.float32)
    return {
        name: distributed.broadcast(
            own[name] if name in own else torch.empty(*shape, dtype=dtype, device=model.device),
            number % distributed.world_size(),
        ).cpu()
        for number, (name, shape) in enumerate(shapes.items())
    }


def _target(logits: Tensor, batch: Batch, keep: Tensor, *, likelihood: bool) -> Tensor:
    """Sum of the answer tokens' logits, or log-probabilities, over the rows in the mask `keep`."""
    logits = logits.log_softmax(-1) if likelihood else logits
    of_answers = logits.gather(-1, answer_tokens(batch).unsqueeze(-1)).squeeze(-1)
    rows = answer_places(batch).nonzero()[:, 0]
    return of_answers[keep[rows]].sum()


def _select(batch: Batch, keep: Tensor, weighting: MomentWeighting | None) -> Selection:
    """Select the rows in the mask `keep` and the tokens that count toward moments."""
    positions = torch.arange(batch.input_ids.shape[1], device=keep.device)
    # Exclude padding, and each row's last token, which predicts nothing.
    counted = (positions < batch.lengths.unsqueeze(1) - 1) & keep.unsqueeze(1)
    if weighting == "answer":
        counted[:, :-1] &= answer_places(batch)
    return Selection(keep.nonzero().squeeze(1), counted.flatten().nonzero().squeeze(1))
