"""Memory that a config needs, by a formula, from its model's shape alone.

Every term is what the code allocates (float32 has 4 bytes a number): `agcl/SPEED.md` states them.
Not counted: Python and torch themselves, the CUDA context, and what an allocator cannot use again.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from agcl.attribution.attribute import SKETCH
from agcl.parallel.distributed import owners
from agcl.scoring.evaluate import LOGITS_TOKENS, PASS_ANSWERS, PASS_TOKENS

from pipeline.config.method import Project
from pipeline.estimate.decomposed import decompose_peak
from pipeline.estimate.setting import (
    FLOAT,
    HALF,
    Part,
    Parts,
    Setting,
    cast_weights,
    entries,
    largest,
    loading,
    logits_size,
    model_parts,
    of_all_workers,
    repeated,
    summed_columns,
    total,
)
from pipeline.estimate.training import train_phases

T = TypeVar("T")
TRAIN, ATTRIBUTE, EVALUATE, DECOMPOSE = "train", "attribute", "evaluate", "corda"


def peaks(setting: Setting) -> dict[str, Parts]:
    """The parts of each kind of stage's peak of a worker; only of kinds that the config has."""
    return {kind: largest(setting, phases) for kind, phases in _phases(setting).items()}


def main_memory(setting: Setting) -> Parts:
    """The most main memory that all workers need at a time if they share one machine."""
    phases = [phase for each in _phases(setting).values() for phase in each]
    everywhere = [of_all_workers(setting, phase) for phase in phases]
    return max(everywhere, key=lambda parts: total(parts, on_gpu=False))


def _phases(setting: Setting) -> dict[str, list[Parts]]:
    config, found = setting.config, {TRAIN: train_phases(setting)}
    if config.measured:
        found[ATTRIBUTE] = _attribution(setting)
        if setting.of_base and config.base.protect != "none":
            of_base = replace(setting, row=setting.of_base)
            found[ATTRIBUTE] += _attribution(of_base, of_base=True)
    if config.starts_from_corda:
        found[DECOMPOSE] = [decompose_peak(setting)]
    return found | {EVALUATE: _evaluation(setting)}


def _attribution(setting: Setting, *, of_base: bool = False) -> list[Parts]:
    """Phases of attribution: the end of a forward pass, and the final decomposition.

    During the decomposition, results and running sums coexist. `of_base`: attribution of the base
    model, which has its own weighting, instead of a task.
    """
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
    running = (per_value * (importance.top_k or 1) if averages else FLOAT) * own
    tokens, answers = importance.batch_size * row.tokens, importance.batch_size * row.answer
    half = setting.attributed_bytes == HALF
    autocast = importance.precision == "bfloat16" and not half
    bits = {"half": half, "autocast": autocast}
    hooks = shape.held_by_hooks(tokens, entries=bool(own), **bits)
    weighting = config.base.weighting if of_base else projection and projection.weighting
    backward = own or (projection and weighting == "relevance")
    layer = shape.passing(tokens, half=half or autocast)
    if backward:
        layer = shape.kept_by_attribution(tokens, row.tokens, **bits) + hooks
        if not (half or autocast):
            layer += repeated(setting, tokens)
    activations = layer * (shape.layers + 1) if backward else layer
    if (
        not (backward or of_base) and importance.correct_only
    ):  # Inputs wait until it is known which rows count.
        activations += hooks * shape.layers
    held = [
        *model_parts(setting, gathered=False, size=setting.attributed_bytes),
        Part("moments", FLOAT * moments),
        Part("running values", running),
    ]
    directions = FLOAT * setting.kept * bool(projection)
    widened = FLOAT * max(out * width for out, width in setting.protected) * half * bool(own)
    results = [Part("results", FLOAT * own), Part("directions", directions, on_host=True)]
    if sharing > 1 and own:  # The first worker gets all layers' results, in main memory.
        whole = FLOAT * entries(setting.protected)
        results.append(Part("results of all workers", whole, on_host=True, once=True))
    widest = max(map(summed_columns, setting.inputs)) if projection else 0
    saved = Part(
        "results as they are saved",
        HALF * entries(setting.protected) * bool(own),
        on_host=True,
        once=True,
    )
    return [
        loading(setting, setting.attributed_bytes),
        (
            *held,
            Part("activations", activations),
            # Kept for the backward pass; without one, a layer's copy ends with the layer.
            Part("bfloat16 copies", HALF * cast_weights(setting) * bool(autocast and backward)),
            Part("logits", logits_size(shape, answers, 2 + (half or autocast))),
            Part("a weight in float32", widened),
        ),
        (*held, *results, Part("decomposing a moment", 4 * FLOAT * widest**2)),
        (*held[:-2], *results, saved),
    ]


def _owned(items: Sequence[T], owned: Sequence[int], rank: int) -> list[T]:
    return [item for item, owner in zip(items, owned, strict=True) if owner == rank]


def _summed(widths: Sequence[int]) -> int:
    """Numbers that attribution sums for inputs."""
    return sum(width * summed_columns(width) for width in widths)


def _evaluation(setting: Setting) -> list[Parts]:
    """Scoring the tasks, decoding answers, and comparing with the base model beside it."""
    shape, config, row = setting.shape, setting.config, setting.row
    half = config.evaluation.precision == "bfloat16" and setting.weight_bytes == FLOAT
    rows = config.evaluation.batch_size
    model = model_parts(setting, gathered=False)
    # While answers are decoded, autocast caches all copies; otherwise one weight has one at a time.
    of_weight = max(shape.vocabulary * shape.width, *(out * width for out, width in shape.linears))
    once = Part("a bfloat16 copy", HALF * of_weight * half)
    cached = Part("bfloat16 copies", HALF * cast_weights(setting) * half * setting.decodes)
    compared = max(PASS_TOKENS, row.tokens)
    shares_base = config.adapter is not None and not config.adapter.merge
    base = [] if shares_base else model_parts(setting, gathered=False)[:1]
    comparing = logits_size(shape, 2 * PASS_ANSWERS + 4 * LOGITS_TOKENS, 1)
    second = [Part("the base model", part.size) for part in base]
    scored = Part("activations", shape.passing(rows * row.tokens, half=half))
    cache = Part("keys and values", setting.decodes * _cache(setting, autocast=half))
    return [
        loading(setting),
        (*model, once, scored, Part("logits", logits_size(shape, rows * row.answer, 1))),
        (*model, cached, scored, cache),
        (
            *model,
            once,
            *second,
            Part("activations", shape.passing(compared, half=half)),
            Part("logits", comparing),
        ),
    ]


def _cache(setting: Setting, *, autocast: bool) -> int:
    """Keys and values of all layers of a batch that is decoded."""
    shape, settings, row = setting.shape, setting.config.evaluation, setting.row
    key = value = setting.weight_bytes
    if autocast:  # Which does not round rotated keys.
        key, value = FLOAT if shape.is_rotary else HALF, HALF
    tokens = row.tokens - row.answer + (settings.max_new_tokens or row.answer)
    return settings.batch_size * tokens * shape.layers * shape.key * (key + value)
