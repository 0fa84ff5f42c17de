"""Memory of a train stage, by a formula: see `memory.py`."""

import math

from agcl.modulation.checks import SAMPLED_OUTPUTS
from agcl.modulation.eight_bit import BLOCK
from agcl.modulation.rounding import BLOCK_ENTRIES
from agcl.modulation.step import CHUNK_ENTRIES
from agcl.parallel.distributed import BUCKET_BYTES

from pipeline.config.config import Config
from pipeline.config.method import Project
from pipeline.config.weights import rounds_to_nearest
from pipeline.estimate.decomposed import (
    bases_size,
    decomposing,
    held_factors,
    kept_by_factors,
    projection_of_weights,
    trained_factors,
)
from pipeline.estimate.setting import (
    FLOAT,
    HALF,
    Part,
    Parts,
    Setting,
    cast_weights,
    entries,
    kept_columns,
    loading,
    logits_size,
    model_parts,
    repeated,
)

_LOGITS = {False: 3, True: 6}
"""Copies of logits in a loss; with a reference also both models' log-probabilities and the terms
of their divergence."""


def train_phases(setting: Setting) -> list[Parts]:
    """The phases of the worst task: the first one, or a later one with all protections."""
    config = setting.config
    of_base = config.measured and config.base.protect != "none"
    always = of_base or len(config.measured) < len(config.protect)
    phases = [] if always else _training(setting, protects=False)
    if config.protect:
        phases += [*_training(setting, protects=True), _deciding(setting)]
    return [loading(setting), *phases]


def trained_weights(setting: Setting, *, protects: bool) -> int:
    """Weights with a gradient and Adam's two running means."""
    if setting.config.adapter:
        return entries(setting.factors)
    if setting.config.subspace:
        return trained_factors(setting)
    only = protects and any(item.ungated == "freeze" for item in setting.config.protect)
    return setting.shape.linear_weights if only else setting.shape.weights


def _training(setting: Setting, *, protects: bool) -> list[Parts]:
    """The end of a forward pass, of a backward pass, the optimizer's step, and what is written."""
    shape, config = setting.shape, setting.config
    trained, size = trained_weights(setting, protects=protects), setting.weight_bytes
    of_trained = FLOAT if setting.config.trains_factors else size  # PEFT's factors are float32.
    frozen = trained != shape.weights
    rows, passes = _pass(setting)
    tokens, answers = rows * setting.row.tokens, rows * setting.row.answer
    half = config.training.precision == "bfloat16" and size == FLOAT
    kept = shape.kept_by_training(tokens, setting.row.tokens, half=half, frozen=frozen)
    if size == HALF:
        kept = shape.kept_in_bfloat16(tokens, setting.row.tokens, frozen=frozen)
    if size == FLOAT and not half:
        kept += repeated(setting, tokens)
    if config.adapter:
        bits = {"autocast": config.training.precision == "bfloat16", "in_half": size == HALF}
        kept += shape.kept_for_adapter(tokens, config.adapter.rank, **bits)
    checkpointing = config.training.activation_checkpointing
    # The backward pass begins with gradients of what its first layer kept.
    activations = kept * (shape.layers + 1)
    if checkpointing:
        activations = 2 * kept + size * tokens * shape.width * shape.layers
    activations += 3 * size * tokens * shape.width  # Embeddings and the last norm.
    held = [
        *model_parts(setting, gathered=True),
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
        Part("logits", logits_size(shape, answers, _LOGITS[config.loss.needs_reference])),
    ]
    several = passes > 1
    temporary = max(out * width for out, width in shape.linears)
    if not frozen:  # A tied matrix gets two gradients, which are added in a third.
        temporary = max(temporary, (1 + several) * shape.vocabulary * shape.width)
    layer = [Part("activations", kept), Part("a weight's gradient", of_trained * temporary)]
    eight_bit = config.training.optimizer == "adamw_8bit"
    copies = FLOAT * _stepped(setting, trained, protects or eight_bit or of_trained == HALF)
    copied = 5 if of_trained == HALF else 2
    summed = BUCKET_BYTES if setting.ranks > 1 and _shards(setting) == 1 else 0
    saved = of_trained * trained + state_size(config, trained)
    saved *= bool(config.resources.checkpoint_minutes) * setting.on_gpu
    whole = size * shape.weights * (setting.shards > 1)
    return [
        (*held, *passing, *((gradients,) if several else ())),
        (*held, gradients, *layer),
        (*held, gradients, Part("gradients summed over workers", summed)),
        (
            *held,
            gradients,
            Part("copies of a step", (copied + 4 * eight_bit) * copies),
        ),
        (*held, Part("a checkpoint as it is written", saved, on_host=True, once=True)),
        (*held, Part("the whole model as it is saved", whole, on_host=True, once=True)),
    ]


def _stepped(setting: Setting, trained: int, in_pieces: bool) -> int:
    """Weights that a step copies at a time: pieces of protected ones, or of those it rounds."""
    if setting.config.training.optimizer == "sgd":
        return entries(setting.protected) * in_pieces
    # A piece anywhere, and on a GPU a chunk of pieces.
    return min((BLOCK_ENTRIES + CHUNK_ENTRIES * setting.on_gpu) * in_pieces, trained)


def _reference(setting: Setting) -> list[Part]:
    """The frozen model that the loss looks at, unless it is the trained one without its adapter."""
    loss, adapter = setting.config.loss, setting.config.adapter
    own = adapter is not None and (loss.reference == "previous") == adapter.fresh
    own &= not setting.config.starts_from_corda  # Which changes the weights below its factors.
    if own or not loss.needs_reference:
        return []
    size = HALF if setting.on_gpu else setting.weight_bytes
    return [Part("reference model", size * setting.shape.weights // setting.shards)]


def optimizer_states(setting: Setting, trained: int) -> Part:
    """What the optimizer keeps between steps on a worker."""
    kept = "momentum" if setting.config.training.optimizer == "sgd" else "Adam"
    return Part(kept, state_size(setting.config, trained) // _shards(setting))


def state_size(config: Config, trained: int) -> int:
    """Bytes of Adam's two running means, or of SGD's momentum.

    In float32; Adam's in one byte each, or as torch has them, in the weights' dtype.
    """
    of_mean = HALF if rounds_to_nearest(config) else FLOAT
    return {
        "adamw": 2 * of_mean * trained,
        "adamw_8bit": 2 * (trained + FLOAT * trained // BLOCK),
        "sgd": FLOAT * trained,
    }[config.training.optimizer]


def _shards(setting: Setting) -> int:
    """Workers that share what is trained: every worker has all of an adapter's factors."""
    return 1 if setting.config.adapter else setting.shards


def _pass(setting: Setting) -> tuple[int, int]:
    """Rows of the largest forward pass of a training step, and passes of a worker per step.

    However many workers there are: `agcl.tasks.batches.micro_batches` does not look at them.
    """
    training = setting.config.training
    rows = min(training.batch_size, max(1, training.max_tokens // setting.row.tokens))
    rows = min(rows, training.micro_batch_size or rows)
    return rows, math.ceil(training.batch_size / (rows * setting.ranks))


def _cast(setting: Setting, checkpointing: bool) -> int:
    """Weights whose copies by autocast are kept for the backward pass, on each worker.

    With checkpointing those of the head, and of the layer that is recomputed.
    """
    shape = setting.shape
    if checkpointing and not setting.config.model.quantization:
        return shape.linear_weights // shape.layers + shape.vocabulary * shape.width
    return cast_weights(setting)


def _protection(setting: Setting) -> list[Part]:
    """What the items of `protect` hold while a task is trained."""
    parts, count = [], entries(setting.protected)
    kinds = {item.kind for item in setting.config.protect}
    if "project" in kinds:
        bases = bases_size(setting)
        # The optimizer's, of bfloat16 weights in bfloat16 beside those in float32.
        half = setting.weight_bytes == HALF and not setting.config.trains_factors
        parts.append(Part("bases", bases // 2 if half else bases))
        beside = setting.on_gpu or half
        parts += [Part("bases in main memory", bases, on_host=True)] * beside
        if half:  # A piece of a step multiplies with its basis in float32.
            widest = int(FLOAT * setting.directions * max(setting.inputs) ** 2)
            parts.append(Part("a basis in float32", widest))
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
        found = Part("bases", bases_size(setting), on_host=True)
        return (*model_parts(setting, gathered=False), found, decomposing(setting))
    projects = any(isinstance(item, Project) for item in setting.config.measured)
    widest = max(setting.inputs) if projects else 0
    kept = kept_columns(widest, setting.config.importance.keep)
    known = bases_size(setting) if setting.config.base.protect != "none" else 0
    return (
        *model_parts(setting, gathered=False),
        Part("bases", known + bases_size(setting), on_host=True),
        Part("an input's moment", 2 * FLOAT * (5 if known else 1) * widest * kept),
    )


def _checked(setting: Setting) -> int:
    """Weights that show whether a gate or a projection held: of fresh factors only of A."""
    adapter = setting.config.adapter
    of = setting.factors[::2] if adapter and adapter.fresh else setting.protected
    return entries([(min(out, SAMPLED_OUTPUTS), width) for out, width in of])
