"""Memory that a config needs, by a formula, from its model's shape alone.

Every term is what the code allocates (float32 has 4 bytes a number): `agcl/SPEED.md` states them.
Not counted: Python and torch themselves, the CUDA context, and what an allocator cannot use again.
"""

import math
from collections.abc import Sequence
from typing import TypeVar

from agcl.attribution.attribute import SKETCH
from agcl.modulation.checks import SAMPLED_OUTPUTS
from agcl.parallel.distributed import BUCKET_BYTES, owners

from pipeline.config.method import Project
from pipeline.plan.decomposed import (
    decompose_peak,
    decomposing,
    directions_of_weights,
    held_factors,
    kept_by_factors,
    projection_of_weights,
    trained_factors,
)
from pipeline.plan.setting import (
    FLOAT,
    HALF,
    Part,
    Parts,
    Setting,
    entries,
    kept_columns,
    summed_columns,
    total,
)
from pipeline.plan.shape import Shape

T = TypeVar("T")
TRAIN, ATTRIBUTE, EVALUATE, DECOMPOSE = "train", "attribute", "evaluate", "corda"
_CHUNK, _PIECE = 2**24, 2**22
"""Weights of a protected step at a time, on a GPU and anywhere (`agcl/modulation/step.py`)."""
_LOGITS = {False: 3, True: 6}
"""Copies of logits in a loss; with a reference also both models' log-probabilities and the terms
of their divergence."""
_KL_TOKENS, _KL_ANSWERS, _KL_PART = 2048, 512, 128
"""Of a pass that compares with the base model (`agcl/scoring/evaluate.py`)."""


def peaks(setting: Setting) -> dict[str, Parts]:
    """The parts of each kind of stage's peak; only of kinds that the config has."""
    config, found = setting.config, {TRAIN: train_peak(setting)}
    if config.measured:
        found[ATTRIBUTE] = attribute_peak(setting)
    if config.starts_from_corda:
        found[DECOMPOSE] = decompose_peak(setting)
    return found | {EVALUATE: evaluate_peak(setting)}


def train_peak(setting: Setting) -> Parts:
    """The worst moment of the worst task: the first one, or a later one with all protections."""
    config = setting.config
    of_base = config.measured and config.base.protect != "none"
    always = of_base or len(config.measured) < len(config.protect)
    moments = [] if always else _training(setting, protects=False)
    if config.protect:
        moments += [*_training(setting, protects=True), _deciding(setting)]
    return _largest(setting, moments)


def trained_weights(setting: Setting, *, protects: bool) -> int:
    """Weights with a gradient and Adam's two moments."""
    if setting.config.adapter:
        return entries(setting.factors)
    if setting.config.subspace:
        return trained_factors(setting)
    only = protects and any(item.ungated == "freeze" for item in setting.config.protect)
    return setting.shape.linear_weights if only else setting.shape.weights


def _training(setting: Setting, *, protects: bool) -> list[Parts]:
    """The end of a forward pass, of a backward pass, and the optimizer's step."""
    shape, config = setting.shape, setting.config
    trained, size = trained_weights(setting, protects=protects), setting.weight_bytes
    of_trained = FLOAT if _has_factors(setting) else size  # PEFT's factors are float32.
    frozen = trained != shape.weights
    rows, passes = _pass(setting)
    tokens, answers = rows * setting.row.tokens, rows * setting.row.answer
    half = config.training.precision == "bfloat16" and size == FLOAT
    kept = shape.kept_by_training(tokens, setting.row.tokens, half=half, frozen=frozen)
    if size == HALF:
        kept = shape.kept_in_bfloat16(tokens, setting.row.tokens, frozen=frozen)
    checkpointing = config.training.activation_checkpointing
    # The backward pass begins with gradients of what its first layer kept.
    activations = kept * (shape.layers + 1)
    if checkpointing:
        activations = 2 * kept + size * tokens * shape.width * shape.layers
    activations += 3 * size * tokens * shape.width  # Embeddings and the last norm.
    held = [
        *_model(setting, gathered=True),
        *_reference(setting),
        optimizer_states(setting, trained),
        *(_protection(setting) if protects else ()),
        *held_factors(setting),
    ]
    of_pass = HALF if half else FLOAT
    activations += kept_by_factors(setting, tokens, size=of_pass, checkpointing=checkpointing)
    if half:
        held.append(Part("bfloat16 copies", HALF * _cast(setting, checkpointing)))
    gradients = Part("gradients", of_trained * trained // _shards(setting))
    passing = [
        Part("activations", activations),
        Part("logits", _logits(shape, answers, _LOGITS[config.loss.needs_reference])),
    ]
    several = passes > 1
    temporary = max(out * width for out, width in shape.linears)
    if not frozen:  # A tied matrix gets two gradients, which are added in a third.
        temporary = max(temporary, (1 + several) * shape.vocabulary * shape.width)
    layer = [Part("activations", kept), Part("a weight's gradient", of_trained * temporary)]
    copies = FLOAT * _stepped(setting, trained, protects or of_trained == HALF)
    summed = BUCKET_BYTES if setting.ranks > 1 and _shards(setting) == 1 else 0
    return [
        (*held, *passing, *((gradients,) if several else ())),
        (*held, gradients, *layer),
        (*held, gradients, Part("gradients summed over workers", summed)),
        (
            *held,
            gradients,
            Part("copies of a step", (5 if of_trained == HALF else 2) * copies),
        ),
    ]


def _stepped(setting: Setting, trained: int, in_pieces: bool) -> int:
    """Weights that a step copies at a time: pieces of protected ones, or of those it rounds."""
    if setting.config.training.optimizer == "sgd":
        return entries(setting.protected) * in_pieces
    return min((_PIECE + _CHUNK * setting.on_gpu) * in_pieces, trained)


def _reference(setting: Setting) -> list[Part]:
    """The frozen model that the loss looks at, unless it is the trained one without its adapter."""
    loss, adapter = setting.config.loss, setting.config.adapter
    own = adapter is not None and (loss.reference == "previous") == adapter.fresh
    own &= not setting.config.starts_from_corda  # Which changes the weights below its factors.
    if own or not loss.needs_reference:
        return []
    return [Part("reference model", HALF * setting.shape.weights // setting.shards)]


def optimizer_states(setting: Setting, trained: int) -> Part:
    """Adam's two running means, or SGD's momentum."""
    if setting.config.training.optimizer == "sgd":
        return Part("momentum", FLOAT * trained // _shards(setting))
    return Part("Adam", 2 * FLOAT * trained // _shards(setting))


def _shards(setting: Setting) -> int:
    """Workers that share what is trained: every worker has all of an adapter's factors."""
    return 1 if setting.config.adapter else setting.shards


def _has_factors(setting: Setting) -> bool:
    """Whether PEFT's factors are trained beside frozen weights."""
    return bool(setting.config.adapter or setting.config.subspace)


def _pass(setting: Setting) -> tuple[int, int]:
    """Rows of the largest forward pass of a training step, and passes of a worker per step."""
    training, ranks = setting.config.training, setting.ranks
    rows = min(training.batch_size, max(1, training.max_tokens // setting.row.tokens))
    rows = min(rows, training.micro_batch_size or math.ceil(training.batch_size / ranks))
    return rows, math.ceil(training.batch_size / (rows * ranks))


def _cast(setting: Setting, checkpointing: bool) -> int:
    """Weights that autocast copies: those of every linear layer, on each worker.

    They are kept for the backward pass, and those of trained weights while autocast lasts.
    """
    shape = setting.shape
    if _has_factors(setting) and checkpointing:
        return shape.linear_weights // shape.layers + shape.vocabulary * shape.width
    return shape.linear_weights + shape.vocabulary * shape.width


def _model(setting: Setting, *, gathered: bool, size: int = 0) -> list[Part]:
    """The model: a shard of it and, of a sharded one, what a worker gathers while it computes.

    `size` is that of a weight, if not the config's.
    """
    shape, size = setting.shape, size or setting.weight_bytes
    parts = [Part("weights", size * shape.weights // setting.shards)]
    if setting.config.adapter:
        parts.append(Part("adapter", FLOAT * entries(setting.factors)))
    if setting.shards > 1:
        # This layer and the next, and embeddings and head; with gradients as large.
        largest = 2 * shape.layer_weights + shape.embeddings
        parts.append(Part("gathered layers", (1 + gathered) * size * largest))
        parts.append(Part("the whole model while it loads", size * shape.weights, on_host=True))
    return parts


def _protection(setting: Setting) -> list[Part]:
    """What the items of `protect` hold while a task is trained."""
    parts, count = [], entries(setting.protected)
    kinds = {item.kind for item in setting.config.protect}
    if "project" in kinds:
        bases = _bases(setting)
        parts.append(Part("bases", bases))
        parts += [Part("bases in main memory", bases, on_host=True)] * setting.on_gpu
    if "gate" in kinds:
        parts.append(Part("gates", count // _shards(setting)))
        parts.append(Part("gates in main memory", FLOAT * count, on_host=True))
    if "penalty" in kinds:
        # Fresh factors start from zero, which needs no copy.
        copies = 1 if setting.config.adapter and setting.config.adapter.fresh else 2
        parts.append(Part("anchors and importance", copies * FLOAT * count // _shards(setting)))
    if kinds - {"penalty"}:
        checked = setting.weight_bytes * _checked(setting)
        parts.append(Part("weights before the task", checked, on_host=True))
    return parts


def _deciding(setting: Setting) -> Parts:
    """Before a task: each input's moment loses the base's directions, in float64.

    Or each weight is decomposed.
    """
    if projection_of_weights(setting):
        found = Part("bases", _bases(setting), on_host=True)
        return (*_model(setting, gathered=False), found, decomposing(setting))
    projects = any(isinstance(item, Project) for item in setting.config.measured)
    widest = max(setting.inputs) if projects else 0
    kept = kept_columns(widest, setting.config.importance.keep)
    known = _bases(setting) if setting.config.base.protect != "none" else 0
    return (
        *_model(setting, gathered=False),
        Part("bases", known + _bases(setting), on_host=True),
        Part("an input's moment", 2 * FLOAT * (5 if known else 1) * widest * kept),
    )


def attribute_peak(setting: Setting) -> Parts:
    """The end of a forward pass, or the end, when results are beside what they are made from."""
    shape, config = setting.shape, setting.config
    importance, row = config.importance, setting.row
    sharing = setting.ranks if setting.shards > 1 or importance.split == "layers" else 1
    owned = owners([out * width for out, width in setting.protected], sharing)
    shares = [_owned(setting.protected, owned, rank) for rank in range(sharing)]
    owned = owners([width * summed_columns(width) for width in setting.inputs], sharing)
    of_rank = [_owned(setting.inputs, owned, rank) for rank in range(sharing)]
    projection = next((p for p in config.measured if isinstance(p, Project)), None)
    moments = max(map(_summed, of_rank)) if projection else 0
    if projection:  # And one test matrix for all sketches of a width.
        moments += sum(w * SKETCH for w in set(setting.inputs) if w > 2 * SKETCH)
    own = max(map(entries, shares)) if config.measures_entries else 0
    per_value = HALF if importance.running_values == "bfloat16" else FLOAT
    averages = importance.top_k and importance.estimator in ("lrp", "grad_x_param")
    running = per_value * (importance.top_k or 1) * own if averages else FLOAT * own
    tokens, answers = importance.batch_size * row.tokens, importance.batch_size * row.answer
    size = setting.attributed_bytes
    half = size == HALF
    hooks = shape.held_by_hooks(tokens, entries=bool(own), half=half)
    backward = own or (projection and projection.weighting == "relevance")
    layer = shape.passing(tokens, half=half)
    if backward:
        layer = shape.kept_by_attribution(tokens, row.tokens, half=half) + hooks
    activations = layer * (shape.layers + 1) if backward else layer
    if not backward and importance.correct_only:  # Inputs wait until it is known which rows count.
        activations += hooks * shape.layers
    held = [
        *_model(setting, gathered=False, size=size),
        Part("moments", FLOAT * moments),
        Part("running values", running),
    ]
    directions = FLOAT * setting.kept * bool(projection)
    widened = FLOAT * max(out * width for out, width in setting.protected) * half * bool(own)
    results = [Part("results", FLOAT * own), Part("directions", directions, on_host=True)]
    if sharing > 1 and own:  # Every worker gets all layers' results, in main memory.
        whole = FLOAT * entries(setting.protected)
        results.append(Part("results of all workers", whole, on_host=True))
    widest = max(map(summed_columns, setting.inputs)) if projection else 0
    return _largest(
        setting,
        [
            (
                *held,
                Part("activations", activations),
                Part("logits", _logits(shape, answers, 2 + half)),
                Part("a weight in float32", widened),
            ),
            (*held, *results, Part("decomposing a moment", 4 * FLOAT * widest**2)),
        ],
    )


def _owned(items: Sequence[T], owned: Sequence[int], rank: int) -> list[T]:
    return [item for item, owner in zip(items, owned, strict=True) if owner == rank]


def _summed(widths: Sequence[int]) -> int:
    """Numbers that attribution sums for inputs."""
    return sum(width * summed_columns(width) for width in widths)


def evaluate_peak(setting: Setting) -> Parts:
    """Scoring the tasks, or comparing with the base model, a second model in memory."""
    shape, config, row = setting.shape, setting.config, setting.row
    half = config.evaluation.precision == "bfloat16" and setting.weight_bytes == FLOAT
    rows = config.evaluation.batch_size
    cast = HALF * (shape.linear_weights + shape.vocabulary * shape.width) * half
    model = [*_model(setting, gathered=False), Part("bfloat16 copies", cast)]
    compared = max(_KL_TOKENS, row.tokens)
    shares_base = config.adapter is not None and not config.adapter.merge
    base = [] if shares_base else _model(setting, gathered=False)[:1]
    comparing = _logits(shape, 2 * _KL_ANSWERS + 4 * _KL_PART, 1)
    second = [Part("the base model", part.size) for part in base]
    second += [Part("its bfloat16 copies", cast)] * bool(base)
    return _largest(
        setting,
        [
            (
                *model,
                Part("activations", shape.passing(rows * row.tokens, half=half)),
                Part("logits", _logits(shape, rows * row.answer, 1)),
            ),
            (
                *model,
                *second,
                Part("activations", shape.passing(compared, half=half)),
                Part("logits", comparing),
            ),
        ],
    )


def _largest(setting: Setting, moments: Sequence[Parts]) -> Parts:
    """The moment with the largest total; its parts that are not zero."""
    largest = max(moments, key=lambda parts: total(parts, on_gpu=setting.on_gpu))
    return tuple(part for part in largest if part.size)


def _bases(setting: Setting) -> int:
    """Bytes of the protected directions: `directions` x in² of every input."""
    if projection := projection_of_weights(setting):
        return directions_of_weights(setting, projection)
    return int(FLOAT * setting.directions * sum(width**2 for width in setting.inputs))


def _checked(setting: Setting) -> int:
    """Weights that show whether a gate or a projection held: of fresh factors only of A."""
    adapter = setting.config.adapter
    of = setting.factors[::2] if adapter and adapter.fresh else setting.protected
    return entries([(min(out, SAMPLED_OUTPUTS), width) for out, width in of])


def _logits(shape: Shape, answers: int, copies: int) -> int:
    """Bytes of logits of answer tokens, with so many copies alive in float32."""
    return FLOAT * answers * shape.vocabulary * (copies + shape.capped_logits)
