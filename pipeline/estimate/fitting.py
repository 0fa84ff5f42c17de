"""Whether predicted stages fit a GPU, and what to change where one does not, cheapest first."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from pipeline.config.config import Config
from pipeline.config.conflicts import conflicts
from pipeline.config.method import Adapter, Base, Freeze, Loss, Project, Replay
from pipeline.config.weights import loaded_dtype, rounds_8bit_to_nearest
from pipeline.estimate.memory import ATTRIBUTE, EVALUATE, TRAIN, peaks
from pipeline.estimate.setting import Setting, total

USABLE = 0.9
"""Share of a GPU's memory that tensors can have: the rest is the CUDA context and fragments."""
_WORKERS = (2, 4, 8)
Change = tuple[str, Setting]


def on_device(setting: Setting, kind: str) -> int:
    """Bytes that a kind of stage needs on each worker's device; 0 without such a stage."""
    return total(peaks(setting).get(kind, ()), on_gpu=True)


def remedy(setting: Setting, kind: str, memory: int) -> str | None:
    """The cheapest change of the config that makes a kind of stage fit; None if none does."""
    possible = ((said, each) for said, each in _changes(setting, kind) if _is_accepted(each))
    return next((said for said, changed in possible if fits(changed, kind, memory)), None)


def _is_accepted(setting: Setting) -> bool:
    """Whether a changed config could be run."""
    dtype = loaded_dtype(setting.config.model)
    return not (any(conflicts(setting.config)) or rounds_8bit_to_nearest(setting.config, dtype))


def fits(setting: Setting, kind: str, memory: int) -> bool:
    """Whether a kind of stage fits a GPU with this much memory, in bytes."""
    return on_device(setting, kind) <= USABLE * memory


def _changes(setting: Setting, kind: str) -> Iterator[Change]:
    """Settings to try, in order of what they cost: time, then quality, then workers."""
    yield from _smaller(setting, kind)
    config = setting.config
    whole = config.adapter is None and not config.resources.shard_model
    if kind == TRAIN and whole and config.training.optimizer == "adamw":
        fewer_bits = _with(setting, "training", optimizer="adamw_8bit")
        yield from _joined("training.optimizer=adamw_8bit", fewer_bits, kind)
    if whole and kind != EVALUATE:
        lora = replace(setting, config=_with_lora(config))
        yield from _joined(_method_of(lora.config), lora, kind)
    small = config.model.quantization or config.training.optimizer == "adamw_8bit"
    shards = not (config.subspace or config.starts_from_corda or small)
    now = config.resources.num_workers
    for workers in sorted({*_WORKERS, now} - {1}) if shards else ():
        if workers >= now + config.resources.shard_model:
            sharded = _with(setting, "resources", num_workers=workers, shard_model=True)
            said = "resources.shard_model=true"
            said += f" resources.num_workers={workers}" * (workers > now)
            yield from _joined(said, sharded, kind)


def _joined(said: str, changed: Setting, kind: str) -> Iterator[Change]:
    """A change alone, and with smaller passes as well."""
    yield said, changed
    for more, smaller in _smaller(changed, kind):
        yield f"{said} {more}", smaller


def _smaller(setting: Setting, kind: str) -> Iterator[Change]:
    """The same numbers in less memory, up to rounding: smaller passes, recomputed activations."""
    config = setting.config
    if kind == TRAIN:
        tokens = list(_halved(config.training.max_tokens, setting.row.tokens))
        yield from _each(setting, "training", "max_tokens", tokens)
        if not config.training.activation_checkpointing:
            on = {"activation_checkpointing": True}
            yield from _also("training", on, setting, "max_tokens", tokens)
    elif kind == ATTRIBUTE:
        rows = list(_halved(config.importance.batch_size, 1))
        yield from _each(setting, "importance", "batch_size", rows)
        workers = config.resources.num_workers
        if workers > 1 and not config.resources.shard_model and config.importance.split != "layers":
            yield from _also("importance", {"split": "layers"}, setting, "batch_size", rows)
        if config.measures_entries and config.importance.running_values == "float32":
            values = {"running_values": "bfloat16"}
            yield from _also("importance", values, setting, "batch_size", rows)
        if setting.weight_bytes < setting.attributed_bytes:
            rounded = {"precision": "bfloat16"}
            yield from _also("importance", rounded, setting, "batch_size", rows)
    else:
        rows = list(_halved(config.evaluation.batch_size, 1))
        yield from _each(setting, "evaluation", "batch_size", rows)
        if config.adapter and config.adapter.merge and not config.adapter.fresh:
            unmerged = _with(setting, "adapter", merge=False)
            yield "adapter.merge=false", unmerged
            for said, changed in _each(unmerged, "evaluation", "batch_size", rows):
                yield f"adapter.merge=false {said}", changed


def _also(
    section: str, change: dict[str, Any], setting: Setting, key: str, values: list[int]
) -> Iterator[Change]:
    """A change of a section, alone and with each value of a key of the same section."""
    ((name, value),) = change.items()
    said = f"{section}.{name}={str(value).lower()}"
    changed = _with(setting, section, **change)
    yield said, changed
    for more, smaller in _each(changed, section, key, values):
        yield f"{said} {more}", smaller


def _each(setting: Setting, section: str, key: str, values: list[int]) -> Iterator[Change]:
    for value in values:
        yield f"{section}.{key}={value}", _with(setting, section, **{key: value})


def _halved(value: int, least: int) -> Iterator[int]:
    while value // 2 >= least:
        value //= 2
        yield value


def _with(setting: Setting, section: str, **changes: Any) -> Setting:
    of_section = getattr(setting.config, section).model_copy(update=changes)
    return replace(setting, config=setting.config.model_copy(update={section: of_section}))


def _with_lora(config: Config) -> Config:
    """The config with method `lora_agcl`, or `lora` if nothing is protected."""
    kept = tuple(item for item in config.measured if isinstance(item, Project))
    protect = kept or ((Project(kind="project"),) if config.protect else ())
    base = config.base if protect else Base()
    method = "lora_agcl" if protect else "lora"
    changes = {"method": method, "adapter": Adapter(), "base": base, "protect": protect}
    others = {"replay": Replay(), "freeze": Freeze(), "loss": Loss(), "merge": None}
    return config.model_copy(update={**changes, **others, "subspace": None})


def _method_of(config: Config) -> str:
    """The settings that choose LoRA with this config's protection."""
    if not config.protect:
        return "method=lora"
    of_base = config.base.protect
    return "method=lora_agcl" + (f" base.protect={of_base}" if of_base != "none" else "")
