"""YAML in a config: plain data, with the scalars of YAML 1.2 and without duplicate keys."""

import re
from typing import Any, ClassVar

import yaml
from agcl.errors import one_line

from pipeline.secrets import masked

_CORE_SCHEMA = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    "merge": ("<<", ["<"]),
}
"""YAML 1.2's scalars: a pattern and the first characters by type. PyYAML's own are those of YAML
1.1, which reads 010 as 8, 1:30 as 90, 1e-3 as text and `no` as false."""


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would read as something other than text."""

    yaml_implicit_resolvers: ClassVar = {}  # type: ignore[misc]


class _Loader(yaml.SafeLoader):
    """Plain data only. Refuses duplicate keys, of which the later value would silently win."""

    yaml_implicit_resolvers: ClassVar = {}  # type: ignore[misc]

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if (key.tag, str(key.value)) in seen:
                problem = f"duplicate key {key.value!r}"
                raise yaml.composer.ComposerError(None, None, problem, key.start_mark)
            seen.add((key.tag, str(key.value)))
        return node


for _type, (_pattern, _first) in _CORE_SCHEMA.items():
    for _side in (_Loader, _Dumper):
        _side.add_implicit_resolver(
            f"tag:yaml.org,2002:{_type}", re.compile(f"(?:{_pattern})$"), _first
        )
_Loader.add_constructor(
    "tag:yaml.org,2002:int",
    lambda loader, node: int(node.value, {"0o": 8, "0x": 16}.get(node.value[:2], 10)),
)


def dump(value: Any) -> str:
    """A value as YAML; `parse` of it gives the same value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def parse(text: str) -> Any:
    """The data of a YAML text. Raises `ValueError` with one line."""
    try:
        return yaml.load(text, _Loader)
    except Exception as error:  # PyYAML passes on whatever a malformed scalar raises.
        if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
            # Without the line itself, which PyYAML would quote: it may hold credentials.
            said = f"line {error.problem_mark.line + 1}: {error.problem}"
        else:
            said = one_line(error) or type(error).__name__
        raise ValueError(masked(said)) from None
