"""Attribution of a task's answers: relevance of weights and second moments of layer inputs.

Both are streamed over samples and ranks.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Literal, cast, get_args

import torch
from peft.helpers import disable_input_dtype_casting
from torch import Tensor
from transformers import PreTrainedModel

from agcl.attribution.batch import attribute_batch, like
from agcl.attribution.collector import Collector, Estimator
from agcl.attribution.inputs import (
    InputMoment,
    MomentWeighting,
    collected,
    shared_inputs,
    test_matrix,
)
from agcl.importance import Importance
from agcl.lrp import (
    RuleSet,
    attributed_linears,
    evaluating,
    input_width,
    relevance_backward,
    weight_of,
)
from agcl.lrp.families import architecture_of
from agcl.model.forward import Precision, any_dtype_attention, fast_products
from agcl.parallel import distributed, sharding
from agcl.tasks.batches import Batch

Split = Literal["samples", "layers"]
"""How attribution is distributed over ranks."""


SKETCH = 4096
"""Columns of a wide input's sketch."""


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
    precision: Precision = "float32",
    keep: float = 0.95,
    sketch: int = SKETCH,
    everywhere: bool = True,
    log: Callable[[int], None] = lambda rows_done: None,
) -> Importance:
    """Attribute the answers in all ranks' batches to the weights of the linear layers.

    Entries: a sample's target is the sum of its answer tokens' logits, teacher-forced. A weight's
    relevance is W ⊙ (gᵀx) divided by the relevance that flows through the layer, Σ|z ⊙ g|. Its
    `top_k` largest values over samples are averaged (None: mean over all samples). `entries=False`
    collects only moments, which is all a projection needs, and runs a backward pass only for
    `moments="relevance"`.

    Moments: Σ_t r_t x_t x_tᵀ per input, summed over all tokens of the samples but the last of each.
    Layers that read the same tensor (query, key and value) share one input. The weight r_t is the
    relevance |Σ_i x_ti g_ti| that reaches the input from all these layers, scaled to mean 1
    (`relevance`); 1 (`uniform`); or 1 on tokens that predict an answer token and 0 on others
    (`answer`). With `unit_inputs`, every x_t is scaled to length 1; otherwise a few tokens with
    massive activations (Sun 2024, arXiv 2402.17762) dominate a moment. Each moment is returned as
    its fewest leading directions that hold the share `keep` of the trace, at most 256 or a quarter
    of the input's width, whichever is more; `keep=1` returns all directions. Inputs wider than
    twice `sketch` are summed as a sketch with `sketch` columns (`of_sketch`).

    Other estimators use the ordinary gradient and ignore `rules`. `grad_x_param`: the same
    formula. `fisher`: mean over samples of (∂ log p(answer) / ∂W)², the diagonal of the empirical
    Fisher matrix at the given answers (EWC, Kirkpatrick 2017). `das`: |tanh| of the mean gradient
    of log p(answer), standardized over the layer's entries (after DAS, Ke 2023). The last two
    ignore `top_k`.

    `split="samples"`: every rank passes different batches and keeps running values for all
    layers, which are merged at the end. `split="layers"`, required for a sharded model: all ranks
    pass the same batches, and each keeps running values (`top_k` per weight) only for its share of
    the layers. With `everywhere=False` only rank 0 returns the entries, so that a machine's main
    memory holds them once instead of once per rank. `running_values="bfloat16"` halves the running
    values' memory and rounds each value once.
    `precision="bfloat16"` runs the passes of a float32 model under autocast and rounds the factors
    of other products (on a GPU to TF32); sums stay in float32. It also accepts a model with
    bfloat16 weights, without a float32 copy; the residual stream is then bfloat16 too.

    Up to rounding, the result does not depend on batch size, row order or number of ranks. Raises
    `NoCorrectAnswer` if `correct_only` leaves no sample. Raises `ValueError` without batches, for
    an argument with a value other than these, for a float16 model, for a bfloat16 model without
    `precision="bfloat16"`, for a PEFT wrapper, for a sharded model split by samples, for entries of
    four-bit weights, and if neither entries nor moments are requested.
    """
    _check_arguments(
        top_k,
        keep,
        estimator=estimator,
        moments=moments,
        split=split,
        running_values=running_values,
        precision=precision,
    )
    check_precision(model, precision)
    backward = entries or moments == "relevance"
    if not (backward or moments):
        raise ValueError("nothing to collect: request entries, moments or both")
    by_likelihood = estimator in ("fisher", "das")
    rules = rules if estimator == "lrp" else "gradient"
    top_k = None if by_likelihood else top_k
    linears = attributed_linears(model)
    names = list(linears) if entries else []
    if not all(weight_of(linears[n]).is_floating_point() for n in names):
        raise ValueError("weights in four bits have no entries; attribute moments, or an adapter")
    collectors = {
        n: Collector(linears[n], estimator, top_k, running_values)
        for n in _of_rank(model, {n: weight_of(linears[n]).numel() for n in names}, split)
    }
    reads = shared_inputs(model, linears) if moments else {}
    widths = {n: input_width(linears[n]) for n in dict.fromkeys(reads.values())}
    sizes = {n: w * (sketch if w > 2 * sketch else w) for n, w in widths.items()}
    wide = {width for width in widths.values() if width > 2 * sketch}
    tests = {width: test_matrix(width, sketch, like(model)) for width in wide}
    inputs = {
        n: InputMoment(linears[n], moments, unit_inputs, tests.get(widths[n]))
        for n in _of_rank(model, sizes, split)
        if moments
    }
    counts = torch.zeros(2, dtype=torch.long, device=model.device)
    with (
        ExitStack() as hooks,
        any_dtype_attention(model),
        # Under autocast PEFT would cast the input of each factor A to float32. The base layer does
        # not read that copy, so its share of the relevance at the input would be lost.
        disable_input_dtype_casting(model, active=model.dtype == torch.float32),
    ):
        hooks.enter_context(relevance_backward(model, rules) if backward else evaluating(model))
        hooks.enter_context(fast_products(precision))
        for name, collector in collectors.items():
            hooks.enter_context(linears[name].register_forward_hook(collector.hook))
        for name, moment in inputs.items():
            hooks.enter_context(linears[name].register_forward_hook(moment.hook))
        for batch in batches:
            counts += attribute_batch(
                model,
                batch.to(model.device),
                [*collectors.values()],
                [*inputs.values()],
                target=(_log_likelihood if by_likelihood else _logits) if backward else None,
                weighting=moments,
                correct_only=correct_only,
                precision=precision,
            )
            log(int(counts[0]) * (distributed.world_size() if split == "samples" else 1))
    if split == "samples":
        distributed.sum_in_place([counts])
    _check_counts(*counts.tolist())
    for collector in collectors.values():
        collector.finish(merge=split == "samples")
    relevances = {n: c.entries() for n, c in collectors.items()}
    if split == "layers":
        shapes = {n: cast(Tensor, linears[n].weight).shape for n in names}
        relevances = _from_owners(relevances, shapes, model, everywhere=everywhere)
    second_moments = collected(
        inputs, widths, sizes, like(model), keep=keep, merge=split == "samples"
    )
    return Importance(
        entries=relevances,
        moments=second_moments,
        inputs=reads,
        header={
            "architecture": architecture_of(model),
            "estimator": estimator,
            "rules": rules,
            "top_k": top_k,
            "running_values": running_values,
            "precision": precision,
            "moments": moments,
            "unit_inputs": unit_inputs,
            "keep": keep,
            "kept": round(min((m.kept for m in second_moments.values()), default=1.0), 3),
            "correct_only": correct_only,
            "rows": int(counts[0]),
            "rows_attributed": int(counts[1]),
        },
    )


def _check_arguments(top_k: int | None, keep: float, **chosen: str | None) -> None:
    """Raise `ValueError` for an argument that would fail, or be ignored, later."""
    allowed = {
        "estimator": get_args(Estimator),
        "moments": (*get_args(MomentWeighting), None),
        "split": get_args(Split),
        "running_values": get_args(Precision),
        "precision": get_args(Precision),
    }
    for name, value in chosen.items():
        if value not in allowed[name]:
            raise ValueError(f"{name} must be one of {allowed[name]}, not {value!r}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, or None for all samples, not {top_k}")
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be a share in (0, 1], not {keep}")


def check_precision(model: PreTrainedModel, precision: Precision = "float32") -> None:
    """Raise `ValueError` for a float16 model, or a bfloat16 one if `precision` is float32."""
    coarse = [torch.float16] + [torch.bfloat16] * (precision == "float32")
    if model.dtype in coarse:
        raise ValueError(
            f"the model is in {model.dtype}, too coarse for relevance: load it with "
            'dtype=torch.float32, or bfloat16 with precision="bfloat16"'
        )


def _check_counts(seen: int, used: int) -> None:
    if not seen:
        raise ValueError("no batches to attribute; an iterator can be passed only once")
    if not used:
        raise NoCorrectAnswer(
            f"the model answers none of the {seen} rows correctly; with correct_only=False it is "
            "attributed on wrong answers too"
        )


def _of_rank(model: PreTrainedModel, sizes: Mapping[str, int], split: Split) -> list[str]:
    """Names of the items whose running values this rank keeps; `sizes` are their entry counts.

    All of them if split by samples, a balanced share if split by layers. Raises `ValueError` for a
    sharded model split by samples.
    """
    if split == "layers":
        owners = distributed.owners(list(sizes.values()), distributed.world_size())
        return [n for n, owner in zip(sizes, owners, strict=True) if owner == distributed.rank()]
    if sharding.is_sharded(model):
        raise ValueError("a sharded model must be split by layers: all ranks share each batch")
    return list(sizes)


def _from_owners(
    own: dict[str, Tensor],
    shapes: Mapping[str, Sequence[int]],
    model: PreTrainedModel,
    *,
    everywhere: bool,
) -> dict[str, Tensor]:
    """Every layer's tensor, on every rank or on rank 0. On the CPU: a device may not hold them all.

    Takes the tensors out of `own`, so that this rank's are not held twice.
    """
    sizes = [math.prod(shape) for shape in shapes.values()]
    owners = distributed.owners(sizes, distributed.world_size())
    found = {}
    for (name, shape), owner in zip(shapes.items(), owners, strict=True):
        mine = own.pop(name) if name in own else like(model).new_empty(*shape)
        tensor = distributed.broadcast(mine, owner)
        if everywhere or distributed.rank() == 0:
            found[name] = tensor.cpu()
    return found


def _logits(logits: Tensor) -> Tensor:
    return logits


def _log_likelihood(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1)
