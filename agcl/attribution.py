"""Relevance of every weight for a task's right answers, streamed over samples and workers."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from agcl import distributed, sharding
from agcl.batches import Batch, answer_places, answer_tokens
from agcl.evaluate import answered_correctly
from agcl.forward import Precision, answer_logits
from agcl.importance import Importance, TopK
from agcl.lrp import RuleSet, architecture_of, attributed_linears, relevance_backward, weight_of

MomentWeighting = Literal["relevance", "uniform", "answer"]
Split = Literal["samples", "layers"]
"""What the workers share among them."""
Estimator = Literal["lrp", "grad_x_param", "fisher", "das"]
"""What an entry's value is: its relevance by LRP or by the ordinary gradient, its diagonal Fisher
information, or its standardised gradient."""


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

    Other estimators use the ordinary gradient whatever `rules` says: `grad_x_param` in the same
    formula; `fisher` the mean over samples of (∂ log p(answer) / ∂W)², the diagonal of the
    empirical Fisher matrix at the given answers (EWC, Kirkpatrick 2017); `das` |tanh| of the mean
    gradient of log p(answer), standardised over the layer's entries (after DAS, Ke 2023). The
    last two ignore `top_k`.

    The result does not depend on batch size, order of rows or number of workers, up to rounding.
    Raises `NothingToAttribute` where `correct_only` leaves no sample, `ValueError` for a sharded
    model split by samples.
    """
    by_relevance = estimator in ("lrp", "grad_x_param")
    rules = rules if estimator == "lrp" else "gradient"
    top_k = top_k if by_relevance else None
    target = _logits_of_answers if by_relevance else _log_likelihood
    linears = attributed_linears(model)
    own = _own(model, list(linears), split)
    collectors = {
        n: _Collector(linears[n], estimator, top_k, moments, unit_inputs, running_values)
        for n in own
    }
    seen = used = 0
    with relevance_backward(model, rules):
        handles = [linears[n].register_forward_hook(collectors[n].hook) for n in own]
        try:
            for batch in batches:
                batch = batch.to(model.device)
                logits = answer_logits(model, batch)
                correct = answered_correctly(logits, batch) if correct_only else _all(batch)
                chosen = _chosen(batch, correct, moments)
                for collector in collectors.values():
                    collector.start(chosen)
                if len(chosen.rows):
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
    found = {n: c.entries() for n, c in collectors.items()}
    second = {n: c.second_moment() for n, c in collectors.items()} if moments else {}
    if split == "layers":
        shapes = {n: cast(Tensor, m.weight).shape for n, m in linears.items()}
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


@dataclass(frozen=True)
class _Chosen:
    """What of a batch is attributed; found once for all layers."""

    rows: Tensor
    """Indices, (chosen rows,)."""
    tokens: Tensor
    """Indices of the tokens whose inputs may count, into the flattened (rows, tokens)."""

    def of(self, tensor: Tensor) -> Tensor:
        """The chosen rows of a tensor; itself where that is all of them."""
        return tensor if len(self.rows) == len(tensor) else tensor[self.rows]


def _chosen(batch: Batch, correct: Tensor, weighting: MomentWeighting | None) -> _Chosen:
    """The last token predicts nothing, and padding is no token."""
    places = torch.arange(batch.input_ids.shape[1], device=correct.device)
    real = (places < batch.lengths.unsqueeze(1) - 1) & correct.unsqueeze(1)
    if weighting == "answer":
        real[:, :-1] &= answer_places(batch)
    return _Chosen(correct.nonzero().squeeze(1), real.flatten().nonzero().squeeze(1))


class _Collector:
    """Running sums of one linear layer `z = W x + b`, W (out, in), fed by its forward hook."""

    def __init__(
        self,
        layer: nn.Module,
        estimator: Estimator,
        top_k: int | None,
        moments: MomentWeighting | None,
        unit_inputs: bool,
        running_values: Precision,
    ) -> None:
        weight = weight_of(layer).detach()
        self.transposed = isinstance(layer, Conv1D)
        self.layer, self.device, self.weighting = layer, weight.device, moments
        self.estimator, self.unit_inputs = estimator, unit_inputs
        # Computed in float32, or in float64 for a float64 model.
        dtype = torch.promote_types(weight.dtype, torch.float32)
        kept_in = torch.bfloat16 if running_values == "bfloat16" else dtype
        self.top = TopK(top_k, weight.to(dtype), kept_in) if top_k else None
        self.sum = torch.zeros(() if top_k else weight.shape, dtype=dtype, device=self.device)
        self.count = 0
        self.finite = torch.ones((), dtype=torch.bool, device=self.device)
        width = weight.shape[1] if moments else 0
        self.moment = torch.zeros(width, width, dtype=dtype, device=self.device)
        self.totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        """Sum of r_t, number of tokens."""
        self.inputs: Tensor | None = None
        self.unweighted: Tensor | None = None

    def hook(self, layer: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        inputs = args[0].detach()
        self.inputs = inputs
        if output.requires_grad:
            values = output.detach()
            output.register_hook(lambda gradient: self._backward(inputs, values, gradient))

    def start(self, chosen: _Chosen) -> None:
        """Take what is chosen of the batch just forwarded, before its backward."""
        self._add_unweighted()
        self.chosen = chosen
        self.count += len(chosen.rows)
        inputs, self.inputs = self.inputs, None
        if self.weighting and inputs is not None:
            self.unweighted = inputs.flatten(0, 1)
            self.totals[1] += len(chosen.tokens)

    def _add_unweighted(self) -> None:
        """Count the tokens of a batch whose relevance was not asked for or never came here.

        The rule set cp cuts some layers off; their inputs are protected with equal weights.
        """
        if self.unweighted is not None:
            tokens = self.unweighted[self.chosen.tokens]
            self._add_moment(tokens, torch.ones_like(tokens[:, 0]))
        self.unweighted = None

    def _backward(self, x: Tensor, z: Tensor, g: Tensor) -> None:
        """x (rows, tokens, in), z and g (rows, tokens, out); only chosen rows have g ≠ 0."""
        x, z, g = (self.chosen.of(tensor) for tensor in (x, z, g))
        match self.estimator:
            case "fisher":
                for x_row, g_row in zip(x, g, strict=True):
                    self.sum += (g_row.T @ x_row).square()
            case "das":
                self.sum += g.flatten(0, 1).T @ x.flatten(0, 1)
            case _:
                self._add_relevance(x, z, g)
        if self.weighting == "relevance":
            self._add_moment(x.flatten(0, 1), (z * g).sum(-1).abs().flatten())
            self.unweighted = None

    def _add_moment(self, tokens: Tensor, weights: Tensor) -> None:
        """tokens (tokens, in), weights (tokens,)."""
        self.totals[0] += weights.sum()
        if self.unit_inputs:
            squares = tokens.square().sum(-1)
            weights = torch.where(squares > 0, weights / squares, 0)
        self.moment.addmm_(tokens.T, tokens * weights.unsqueeze(1))

    def _add_relevance(self, x: Tensor, z: Tensor, g: Tensor) -> None:
        weight = weight_of(self.layer).detach()  # A sharded one is whole at this moment.
        flow = (z * g).abs().sum((1, 2))
        # Where nothing flows, a row has no relevance here.
        g_scaled = torch.where(flow > 0, 1 / flow, 0)[:, None, None] * g
        if self.top is None:
            self.sum += weight * (g_scaled.flatten(0, 1).T @ x.flatten(0, 1))
        else:
            self.finite &= torch.isfinite(flow).all()
            self.top.insert_products(weight, x, g_scaled)

    def finish(self, *, merge: bool) -> None:
        """Take in the last batch; reduce over workers, if each had batches of its own."""
        self._add_unweighted()
        if self.top is not None and not self.finite:
            self.top.values.fill_(torch.nan)  # Comparisons lost it.
        if not merge:
            return
        count = torch.tensor([self.top.count if self.top else self.count], device=self.device)
        counts = [int(part) for part in distributed.gather(count)]
        if self.top is None:
            distributed.sum_in_place([self.sum])
            self.count = sum(counts)
        else:
            parts = distributed.gather(self.top.values)
            for other, values in enumerate(parts):
                if other != distributed.rank():
                    self.top.merge(values, counts[other])
        distributed.sum_in_place([self.moment, self.totals])

    def entries(self) -> Tensor:
        """The importance of every entry, in the parameter's own shape."""
        found = self._entries()
        return found.T.contiguous() if self.transposed else found

    def _entries(self) -> Tensor:
        mean = self.sum / self.count if self.top is None else self.top.mean()
        if self.estimator != "das":
            return mean
        # The spread of equal entries is 0, and none of them stands out then.
        return ((mean - mean.mean()) / mean.std().clamp(min=1e-30)).tanh().abs()

    def second_moment(self) -> Tensor:
        relevance, tokens = self.totals.tolist()
        return self.moment * (tokens / relevance) if relevance else self.moment
