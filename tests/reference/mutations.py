"""Hypothesis strategies for broken input: configs, files and JSON."""

from copy import deepcopy

import yaml
from hypothesis import strategies as st

ODD_TEXT = st.sampled_from(
    [
        "",
        " ",
        "a\0b",
        "..",
        "../../up",
        "/",
        "~nobody-here/x",
        "~",
        "x" * 300,
        "x/" * 3000,
        "[red]a[/]",
        "[/b]",
        "\x1b[2J",
        "\r\n",
        "\u2028\u0085",
        "名前",
        "a$b$",
        ".x:y",
        ":",
        "json:dumps",
        "1e999",
        "null",
        "{a}",
        "{",
    ]
)
NUMBERS = st.one_of(
    st.integers(-3, 40),
    st.sampled_from([2**31, 2**63, -(2**63), 10**30, 10**400]),
    st.floats(),
    st.sampled_from([1e-320, 1e308, -0.0]),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, ODD_TEXT, st.text(max_size=8), st.dates())
JUNK = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
RAW_YAML = (
    "!!python/object/apply:os.mkdir [made-by-yaml]",
    "!!python/name:os.system",
    "!!int foo",
    '!!int ""',
    "!!bool maybe",
    "!!timestamp x",
    "!!binary aGk=",
    "!!set {a, b}",
    "!!omap [a: 1]",
    "!unknown x",
    "&a [*a]",
    "&m {m: *m}",
    "*nowhere",
    "[" * 400,
    "{a: 1, a: 2}",
    "{<<: {a: 1}, b: 2}",
    "{1: 2, null: 3, [4]: 5}",
    "2001-12-14t21:59:43.10-99:99",
    "0001-01-01t00:00:00+23:59",
    "2024-13-45",
    "190:20:30",
    '"\\ud800"',
    '"\\0"',
    "|\n  text",
    "@",
    "%",
    "\t",
)
_MARK = "raw-yaml-{}-here"


def _places(node, path=()):
    yield path
    if not isinstance(node, dict | list):
        return
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        yield from _places(value, (*path, key))


def _at(tree, path):
    for key in path:
        tree = tree[key]
    return tree


def _junk(draw, parent, key):
    parent[key] = draw(JUNK)


def _drop(draw, parent, key):
    del parent[key]


def _rename(draw, parent, key):
    if isinstance(parent, dict):
        parent[draw(st.one_of(st.text(max_size=8), SCALARS))] = parent.pop(key)


def _more(draw, parent, key):
    if isinstance(parent, dict):
        parent[draw(st.sampled_from([*parent, "kind", "path", "é"]))] = draw(JUNK)


def _wrap(draw, parent, key):
    parent[key] = [parent[key], deepcopy(parent[key])]


def _write_out(draw, parent, key):
    parent[key] = str(parent[key])


def _raw(draw, parent, key):
    parent[key] = _MARK.format(draw(st.integers(0, len(RAW_YAML) - 1)))


@st.composite
def config_texts(draw, trees):
    """YAML of one of the trees with a few mutations: values, keys, structure, tags, bytes."""
    tree = deepcopy(draw(st.sampled_from(trees)))
    changes = st.sampled_from([_junk, _drop, _rename, _more, _wrap, _write_out, _raw, _raw])
    for _ in range(draw(st.integers(0, 3))):
        if places := [path for path in _places(tree) if path]:
            *path, key = draw(st.sampled_from(places))
            draw(changes)(draw, _at(tree, path), key)
    text = yaml.safe_dump(tree, allow_unicode=True)
    for number, raw in enumerate(RAW_YAML):
        text = text.replace(_MARK.format(number), raw)
    content = text.encode("utf-8", "surrogatepass")
    return draw(damaged(content)) if draw(st.integers(0, 3)) == 0 else content


@st.composite
def overrides(draw, keys):
    """Command-line overrides, mostly of existing keys."""
    number = draw(st.integers(0, 3))
    numbers = st.one_of(st.integers(), st.floats()).map(str)
    values = st.one_of(st.sampled_from(RAW_YAML), ODD_TEXT, numbers)
    odd = st.one_of(st.text(max_size=10), st.sampled_from(["protect.9999999999.kind", "a..b", "."]))
    return [
        f"{draw(st.one_of(st.sampled_from(keys), st.sampled_from(keys), odd))}={draw(values)}"
        for _ in range(number)
    ]


@st.composite
def damaged(draw, content):
    """The bytes with some flipped, removed, truncated, duplicated or inserted."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(changed) - 1)))
        match draw(st.sampled_from("flip flip flip cut end double insert".split())):
            case "flip" if changed:
                changed[place] ^= draw(st.integers(1, 255))
            case "cut":
                del changed[place : place + draw(st.integers(1, 20))]
            case "end":
                del changed[place:]
            case "double":
                changed[place:place] = changed[place : place + draw(st.integers(1, 200))]
            case "insert":
                changed[place:place] = draw(st.binary(max_size=8))
    return bytes(changed)
