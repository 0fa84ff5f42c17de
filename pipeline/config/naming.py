"""The method's name in results, derived from the config's sections, not from `method` alone."""

from functools import cache
from typing import Any

from pipeline.config.config import Config
from pipeline.config.conflicts import UNPROTECTED
from pipeline.config.loading import leaves, validate, with_preset
from pipeline.config.method import METHOD_SECTIONS, OF_MOMENTS
from pipeline.config.presets import METHODS

CHANGES = "+changes"
_TUNABLE = {
    *("entries", "top_k", "running_values", "samples", "batch_size", "split", "past"),
    *("correct_only", "keep", "precision"),
}
"""Keys of `importance` that do not distinguish methods. Other numbers count only as on or off."""
_OF_BASE = {"base.protect"}
_OF_PROJECTED_BASE = {*_OF_BASE, "base.energy", "base.weighting"}
"""Keys of `base` that a method is known by; the others say what its text or rows are."""


def method_name(config: Config) -> str:
    """The preset whose sections these are, tunable values aside; else `<method>+changes`.

    The config's own method is preferred. Bounds and `sequential` have no sections to change.
    """
    own = _structure(config)
    others = [name for name in METHODS if name not in UNPROTECTED]
    names = [config.method] if config.method in UNPROTECTED else [config.method, *others]
    found = (name for name in names if own == _structure_of(name))
    return next(found, f"{config.method}{CHANGES}")


def method_description(config: Config) -> str:
    """The description of the preset; with changes also the settings that differ from it."""
    name = method_name(config)
    if name in METHODS:
        return METHODS[name].description
    preset, own = _structure_of(config.method), dict(leaves(config, include=set(METHOD_SECTIONS)))
    differing = [key for key, value in _structure(config).items() if preset.get(key) != value]
    missing = [key for key in preset if key not in own]
    said = [f"{key}={own[key]}" for key in differing] + [f"no {key}" for key in missing]
    return f"{METHODS[config.method].description}, changed: {', '.join(said)}"


@cache
def _structure_of(method: str) -> dict[str, Any]:
    return _structure(validate(with_preset(method, {"tracking": {"enabled": False}})))


def _structure(config: Config) -> dict[str, Any]:
    """The method's settings by dotted key, without tunable ones; numbers only as on or off."""
    nothing_measured, unprotected = not config.measured, config.base.protect == "none"
    projects = any(item.kind == "project" for item in config.measured)
    unused = {
        f"protect.{number}.{key}"
        for number, item in enumerate(config.protect)
        for key in OF_MOMENTS
        if not item.needs_importance
    }
    of_base = _OF_PROJECTED_BASE if projects else _OF_BASE
    return {
        key: value != 0 if isinstance(value, int | float) else value
        for key, value in leaves(config, include=set(METHOD_SECTIONS))
        if key.removeprefix("importance.") not in _TUNABLE
        and key not in unused
        and not (nothing_measured and key.startswith(("importance.", "base.")))
        and not (key.startswith("base.") and (unprotected or key not in of_base))
    }
