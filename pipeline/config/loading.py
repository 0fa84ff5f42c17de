"""Reads configs: file, overrides and the method's preset become one validated `Config`."""

import difflib
import reprlib
from collections.abc import Mapping, Sequence
from copy import copy, deepcopy
from pathlib import Path
from typing import Any

import yaml
from agcl.errors import InputError
from pydantic import ValidationError

from pipeline.config.config import CREDENTIALS, Config
from pipeline.config.method import METHOD_SECTIONS, Importance
from pipeline.config.presets import METHODS
from pipeline.config.section import Section
from pipeline.config.tasks import FactsTasks
from pipeline.secrets import masked

_MOST_ERRORS = 10
_LARGEST = 100_000
"""Values in a config."""


class _Short(reprlib.Repr):
    """A line at most of any value."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother, self.maxlong = 2, 100, 100, 40

    def repr_str(self, text: str, level: int) -> str:
        """Mask before anything is cut out of the middle."""
        return super().repr_str(masked(text), level)


_shown = _Short().repr


def load(file: Path, overrides: Sequence[str] = (), method: str | None = None) -> Config:
    """Read a YAML config, apply `key.path=value` overrides, fill in the method's preset.

    `method` (or an override of it) that differs from the file's drops the file's method sections,
    which were written for the other method; a variant of the file's keeps them. Raises
    `InputError`, one line naming the key.
    """
    raw = _read(file)
    pairs = [_split(override) for override in overrides]
    chosen = method or next((v for k, v in reversed(pairs) if k == "method"), None)
    in_file = raw.get("method", Config.model_fields["method"].default)
    name = in_file if chosen is None else chosen
    if name not in list(METHODS):
        raise InputError(f"method: no method {_shown(name)} (there are {', '.join(METHODS)})")
    of = METHODS[name].variant_of
    if in_file not in (name, of):
        raw = {k: v for k, v in raw.items() if k not in METHOD_SECTIONS}
    raw = {**deepcopy(METHODS[of or name].sections), **raw, "method": name}
    for key, value in METHODS[name].changes.items():
        _change(raw, name, key, value)
    # Whole sections come first, then kinds: the other keys of an item belong to its kind.
    for key, value in sorted(pairs, key=lambda pair: _order(pair[0])):
        if key != "method":
            _set(raw, key, value)
    if isinstance(raw.get("tasks"), dict):
        raw["tasks"].setdefault("format", FactsTasks.model_fields["format"].default)
    return validate(raw)


def validate(raw: Mapping[str, Any]) -> Config:
    """Build a `Config`; `InputError` of one line, naming every wrong key."""
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        errors = error.errors()
        places = [tuple(e["loc"]) for e in errors]
        # An error inside a value says more than the one about the value as a whole.
        inner = [
            e
            for e, place in zip(errors, places, strict=True)
            if not any(p[: len(place)] == place for p in places if p != place)
        ]
        said = [_explain(e) for e in inner[:_MOST_ERRORS]]
        more = len(inner) - len(said)
        said += [f"and {more} more"] if more else []
        raise InputError(masked("; ".join(said))) from None


def changed(config: Config, settings: Mapping[str, Any]) -> Config:
    """The config with other values under some dotted keys. Raises `InputError` naming the key."""
    raw = config.model_dump(mode="json", context=CREDENTIALS)
    for key, value in settings.items():
        _set(raw, key, value)
    return validate(raw)


def dump(config: Config) -> str:
    """The resolved config as YAML; `load` of it gives the same config, but for credentials."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _change(raw: dict[str, Any], method: str, key: str, value: Any) -> None:
    """Set a variant's key where it belongs."""
    if key in Importance.model_fields:
        _set(raw, f"importance.{key}", value)
        return
    items = raw["protect"] if isinstance(raw["protect"], list) else []
    of_kind = [i for i in items if isinstance(i, dict) and i.get("kind") == "project"]
    if not of_kind:
        raise InputError(f"method: {method} needs an item of kind project in protect")
    of_kind[0][key] = value


_KINDS = ("kind", "format")
_CHOICES = {
    "kind": "'gate', 'penalty', 'project'",
    "format": "'facts', 'concept1k', 'trace', 'cl_benchmark', 'jsonl', 'parquet', 'huggingface'",
    "type": "'uniform', 'loguniform', 'int', 'choice'",
}


def _order(key: str) -> tuple[bool, bool]:
    path, _, last = key.rpartition(".")
    return bool(path), last not in _KINDS


class _Loader(yaml.SafeLoader):
    """Plain data only, and no key twice: the later value would silently win."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if (key.tag, str(key.value)) in seen:
                problem = f"the key {key.value!r} stands twice"
                raise yaml.composer.ComposerError(None, None, problem, key.start_mark)
            seen.add((key.tag, str(key.value)))
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        number = super().construct_yaml_int(node)
        if abs(number) >= 10**40:  # Python refuses to write out those of thousands of digits.
            raise yaml.constructor.ConstructorError(None, None, "a huge number", node.start_mark)
        return number


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _parse(text: str) -> Any:
    """The data of a YAML text. Raises `ValueError` of one line."""
    try:
        value = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:  # Its own text quotes lines, which may hold credentials.
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(masked(f"{where}{error.problem or error.context}")) from None
    except Exception as error:  # PyYAML lets through whatever a malformed scalar raises.
        raise ValueError(masked(" ".join(str(error).split()) or type(error).__name__)) from None
    if _size(value, {}) > _LARGEST:
        raise ValueError("its aliases stand for more values than any config has")
    return value


def _size(value: Any, known: dict[int, int]) -> int:
    """How many values it is with YAML's aliases written out; one that holds itself is endless."""
    if not isinstance(value, dict | list | tuple | set):
        return 1
    if id(value) not in known:
        known[id(value)] = _LARGEST
        inner = [*value, *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_size(each, known) for each in inner)
    return known[id(value)]


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise InputError(f"no config file {file}")
    try:
        raw = _parse(file.read_text(encoding="utf-8"))
    except ValueError as error:  # Also bad UTF-8.
        raise InputError(f"{file}: not valid YAML ({error})") from None
    if raw is None:
        return {}
    if not isinstance(raw, dict) or not all(isinstance(key, str) for key in raw):
        raise InputError(f"{file}: a config is a mapping of sections")
    return raw


def _split(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    shown = _shown(override)
    if not equals or not key:
        raise InputError(f"override {shown}: expected key.path=value")
    try:
        return key, _parse(text)
    except ValueError:
        raise InputError(f"override {shown}: the value is not valid YAML") from None


def _set(raw: dict[str, Any], key: str, value: Any) -> None:
    node: Any = raw
    *path, last = key.split(".")
    for part in path:
        at: Any = part
        if isinstance(node, list):
            _item(node, part, key)
            at = int(part)
        elif node.get(part) is None:
            node[part] = {}
        # Of its own: a YAML alias stands for the very same object in two places.
        node[at] = copy(node[at])
        node = node[at]
        if not isinstance(node, dict | list):
            raise InputError(f"{key}: {part} is not a section")
    if isinstance(node, list):
        _item(node, last, key)
        node[int(last)] = value
        return
    if last in _KINDS and last in node and node[last] != value:
        node.clear()
    node[last] = value


def _item(items: list[Any], part: str, key: str) -> None:
    """Check that a part of a key is a place in the list, and make the one after the last."""
    if not part.isdecimal() or len(part) > 9 or int(part) > len(items):
        raise InputError(f"{key}: {part!r} is not an item of the list (it has {len(items)})")
    if int(part) == len(items):
        items.append({})


def _explain(error: Any) -> str:
    """One pydantic error as `key.path: what is wrong`."""
    # pydantic puts the chosen kind into the path: after `tasks`, an item of `protect` or a key of
    # `search.space`.
    where = error["loc"]
    tag = {"tasks": 1, "protect": 2, "search": 3}.get(str(where[0]) if where else "", 0)
    parts = [str(part)[:100] for index, part in enumerate(where) if not (tag and index == tag)]
    key = ".".join(parts)
    if error["type"] in ("union_tag_not_found", "union_tag_invalid"):
        kind = str(error["ctx"]["discriminator"]).strip("'")
        given = f" (got {_shown(error['ctx']['tag'])})" if "tag" in error["ctx"] else ""
        return f"{key}.{kind}: must be one of {_CHOICES[kind]}{given}"
    if error["type"] == "extra_forbidden":
        close = difflib.get_close_matches(parts[-1], _known_keys(), n=1)
        return f"{key}: unknown key" + (f" (did you mean {close[0]!r}?)" if close else "")
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        # The message of our own validators begins with the field's name.
        return f"{key}.{message}" if key else message
    given = "" if error["type"] == "missing" else f" (got {_shown(error['input'])})"
    return f"{key}: {message[0].lower()}{message[1:]}{given}"


def _known_keys() -> set[str]:
    known: set[str] = set()
    todo: list[type[Section]] = [Section]
    while todo:
        for section in todo.pop().__subclasses__():
            known |= set(section.model_fields)
            todo.append(section)
    return known
