"""Reads a config: the method's preset, the file and the overrides become one validated `Config`."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

from agcl.errors import InputError
from agcl.tasks.layouts import LAYOUTS
from pydantic import ValidationError

from pipeline.config import yaml12
from pipeline.config.config import Config
from pipeline.config.method import METHOD_SECTIONS, Importance
from pipeline.config.presets import METHODS, no_method
from pipeline.config.resources import CREDENTIALS
from pipeline.config.section import Section
from pipeline.config.tasks import FactsTasks
from pipeline.secrets import masked

_MOST_ERRORS = 10
_OF_OTHERS = {
    "num_train_epochs": "training.epochs",
    "lr": "training.learning_rate",
    "lr_scheduler_type": "training.schedule",
    "warmup_ratio": "training.warmup",
    "per_device_train_batch_size": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.micro_batch_size",
    "train_batch_size": "training.batch_size",
    "max_grad_norm": "training.max_gradient_norm",
    "gradient_checkpointing": "training.activation_checkpointing",
    "bf16": "training.precision",
    "torch_compile": "training.compile",
    "per_device_eval_batch_size": "evaluation.batch_size",
    "max_seq_length": "tasks.max_length",
    "lora_alpha": "adapter.alpha",
    "lora_r": "adapter.rank",
    "model_name_or_path": "model.path",
    "output_dir": "storage",
    "report_to": "tracking.report_to",
}
"""What transformers, PEFT and TRL call our settings."""
_KIND_AT = {
    "tasks": (1, "format"),
    "protect": (2, "kind"),
    "base": (2, "format"),
    "search": (3, "type"),
}
"""Where pydantic inserts the chosen kind into the path of an error, and the key that chooses it:
after `tasks`, after an item of `protect`, after `base.rows` and after a key of `search.space`."""
_KINDS = ("kind", "format")
"""Keys that decide which other keys a section has."""


def load(file: Path, overrides: Sequence[str] = (), method: str | None = None) -> Config:
    """Read a YAML config, apply `key.path=value` overrides, fill in the method's preset.

    If `method`, or an override of it, differs from the file's method, the file's method sections
    are dropped, because they were written for the other method (`base` keeps all but `protect`); a
    variant of the file's method keeps them. Raises `InputError`, one line that names the key.
    """
    raw = _read(file)
    settings = [_split(override) for override in overrides]
    chosen = method or next((v for k, v in reversed(settings) if k == "method"), None)
    in_file = raw.get("method", Config.model_fields["method"].default)
    name = in_file if chosen is None else chosen
    if name not in list(METHODS):
        raise InputError(f"method: {no_method(name)}")
    if in_file not in (name, METHODS[name].variant_of):
        raw = _for_any_method(raw)
    raw = with_preset(name, raw)
    # Whole sections first, then kinds: which other keys an item has depends on its kind.
    for key, value in sorted(settings, key=lambda setting: _order(setting[0])):
        if key != "method":
            _set(raw, key, value)
    if isinstance(raw.get("tasks"), dict):
        raw["tasks"] = {"format": FactsTasks.model_fields["format"].default, **raw["tasks"]}
    return validate(raw)


def _for_any_method(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A raw config without the sections of its method; how the base model is measured stays."""
    kept = {key: value for key, value in raw.items() if key not in METHOD_SECTIONS}
    if isinstance(base := raw.get("base"), dict):
        kept["base"] = {key: value for key, value in base.items() if key != "protect"}
    return kept


def with_preset(method: str, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return a raw config with the method's preset filled in: absent keys and absent lists.

    The changes of a variant override sections that the raw config has, too.
    """
    preset = METHODS[method]
    raw = {**raw, "method": method}
    for key, section in METHODS[preset.variant_of or method].sections.items():
        given = raw.setdefault(key, section)
        if isinstance(section, dict) and isinstance(given, dict):
            raw[key] = {**section, **given}
    for key, value in preset.changes.items():
        _change(raw, method, key, value)
    return raw


def validate(raw: Mapping[str, Any]) -> Config:
    """Build a `Config`. Raises `InputError`, one line that names every wrong key."""
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        found = error.errors()
        wrong = {each["loc"] for each in found}
        # A list whose items are wrong is also too short for pydantic, as if it had none.
        errors = [
            each
            for each in found
            if each["type"] != "too_short" or not any(_inside(loc, each["loc"]) for loc in wrong)
        ]
        said = [_explain(each) for each in errors[:_MOST_ERRORS]]
        if len(errors) > _MOST_ERRORS:
            said.append(f"and {len(errors) - _MOST_ERRORS} more")
        raise InputError(masked("; ".join(said))) from None


def _inside(key: tuple[Any, ...], section: tuple[Any, ...]) -> bool:
    return len(key) > len(section) and key[: len(section)] == section


def changed(config: Config, settings: Mapping[str, Any]) -> Config:
    """The config with other values for some dotted keys. Raises `InputError` naming the key."""
    raw = config.model_dump(mode="json", context=CREDENTIALS)
    for key, value in settings.items():
        _set(raw, key, value)
    return validate(raw)


def dump(config: Config) -> str:
    """The resolved config as YAML. `load` of it gives the same config, without credentials."""
    return yaml12.dump(config.model_dump(mode="json"))


def leaves(config: Config, **fields: Any) -> Iterator[tuple[str, Any]]:
    """Every setting by dotted key, as JSON; `fields` as in pydantic's `model_dump`."""
    return flat(config.model_dump(mode="json", **fields))


def flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested mappings and lists, by dotted key."""
    if isinstance(value, Mapping | list | tuple) and value:
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for name, inner in items:
            yield from flat(inner, f"{key}.{name}" if key else str(name))
    elif key:
        yield key, value


def _change(raw: dict[str, Any], method: str, key: str, value: Any) -> None:
    """Set one of a variant's `changes`, in `importance`, `base` or the projection."""
    if key.startswith("base."):
        _set(raw, key, value)
        return
    if key in Importance.model_fields:
        _set(raw, f"importance.{key}", value)
        return
    items = raw["protect"] if isinstance(raw["protect"], list) else []
    for index, item in enumerate(items):
        if isinstance(item, dict) and item.get("kind") == "project":
            _set(raw, f"protect.{index}.{key}", value)
            return
    raise InputError(f"method: {method} needs an item of kind project in protect")


def _order(key: str) -> tuple[bool, bool]:
    path, _, last = key.rpartition(".")
    return bool(path), last not in (*_KINDS, "layout")


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise InputError(f"no config file {file}")
    try:
        raw = yaml12.parse(file.read_text(encoding="utf-8"))
    except ValueError as error:  # Also bad UTF-8.
        raise InputError(f"{file}: not valid YAML ({error})") from None
    if raw is None:
        return {}
    if not isinstance(raw, dict) or not all(isinstance(key, str) for key in raw):
        raise InputError(f"{file}: a config is a mapping of sections")
    return raw


def _split(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"override {_shown(override)}: expected key.path=value")
    try:
        return key, yaml12.parse(text)
    except ValueError:
        raise InputError(f"override {_shown(override)}: the value is not valid YAML") from None


def _set(raw: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key. Copies each section on the way: presets and YAML aliases are shared."""
    node: Any = raw
    *path, last = key.split(".")
    for part, following in pairwise([*path, last]):
        place = _place(node, part, key, [] if following.isdecimal() else {})
        node[place] = copy(node[place])
        node = node[place]
        if not isinstance(node, dict | list):
            raise InputError(f"{key}: {part} is not a section")
    if isinstance(node, dict) and last in _KINDS and not _alike(last, node.get(last, value), value):
        node.clear()  # The other keys belong to the old kind.
    if isinstance(node, dict) and last in ("format", "layout") and value in list(LAYOUTS):
        for template in ("prompt", "answer"):  # Of the file's format; a layout has its own.
            node.pop(template, None)
    node[_place(node, last, key)] = value


def _alike(key: str, old: Any, new: Any) -> bool:
    """Whether two kinds have the same section, so that its other keys fit both."""
    fields = (section.model_fields.get(key) for section in _sections())
    kinds = [get_args(field.annotation) for field in fields if field]
    return old == new or any(old in each and new in each for each in kinds)


def _place(node: dict[str, Any] | list[Any], part: str, key: str, absent: Any = None) -> Any:
    """The key or index that `part` is; what is absent there, or after the last item, is added."""
    if isinstance(node, dict):
        if node.get(part) is None:
            node[part] = absent
        return part
    if not part.isdecimal() or int(part) > len(node):
        raise InputError(f"{key}: {part!r} is not an item of the list (it has {len(node)})")
    if int(part) == len(node):
        node.append(absent)
    return int(part)


def _explain(error: Any) -> str:
    """One pydantic error as `key.path: what is wrong`."""
    where = error["loc"]
    kind_at, chooser = _KIND_AT.get(str(where[0]), (None, "")) if where else (None, "")
    parts = [str(part)[:100] for index, part in enumerate(where) if index != kind_at]
    key = ".".join(parts)
    if error["type"] in ("union_tag_not_found", "union_tag_invalid"):
        kind = str(error["ctx"]["discriminator"]).strip("'")
        given = f" (got {_shown(error['ctx']['tag'])})" if "tag" in error["ctx"] else ""
        return f"{key}.{kind}: must be one of {', '.join(_choices(kind))}{given}"
    if error["type"] == "extra_forbidden":
        meant = _OF_OTHERS.get(parts[-1]) or _closest(parts)
        if meant != parts[-1]:
            return f"{key}: unknown key" + (f" (did you mean {meant!r}?)" if meant else "")
        # A key of another section, or of another kind of this one.
        of_kind = f" for {chooser} {where[kind_at]}" if kind_at and kind_at < len(where) - 1 else ""
        return f"{key}: unknown key{of_kind}"
    message = error["msg"].removeprefix("Value error, ").replace("valid tuple", "list")
    if error["type"] == "value_error":
        # The messages of our own validators begin with the field's name.
        return f"{key}.{message}" if key else message
    given = "" if error["type"] == "missing" else f" (got {_shown(error['input'])})"
    if error["type"] == "string_type" and isinstance(error["input"], dict):
        given += "; text with braces needs quotes in YAML"
    return f"{key}: {message[0].lower()}{message[1:]}{given}"


def _closest(parts: list[str]) -> str:
    """The known key most like an unknown one: of the same section, else of any."""
    field = Config.model_fields.get(parts[0])
    beside = getattr(field.annotation if field else Config, "model_fields", {})
    known = {name for section in _sections() for name in section.model_fields}
    for keys in (beside, known):
        if close := difflib.get_close_matches(parts[-1], keys, n=1):
            return _at_its_section(close[0]) if len(parts) == 1 else close[0]
    return ""


def _at_its_section(key: str) -> str:
    """A key as it is written at the top of a config: `training.epochs` for `epochs`."""
    if key in Config.model_fields:
        return key
    for name, field in Config.model_fields.items():
        section = field.annotation
        fields = getattr(section, "model_fields", {}) if isinstance(section, type) else {}
        if key in fields:
            return f"{name}.{key}"
    return key


def _shown(value: Any) -> str:
    """A value in at most 100 characters. Masked first: a cut could hide that a part is a secret."""
    text = masked(repr(value))
    return text if len(text) <= 100 else f"{text[:97]}..."


def _choices(kind: str) -> list[str]:
    """Every value of the key that tells the sections of a union apart."""
    fields = (section.model_fields.get(kind) for section in _sections())
    values = [value for field in fields if field for value in get_args(field.annotation)]
    return [repr(value) for value in dict.fromkeys(values)]


def _sections(base: type[Section] = Section) -> Iterator[type[Section]]:
    for section in base.__subclasses__():
        yield section
        yield from _sections(section)
