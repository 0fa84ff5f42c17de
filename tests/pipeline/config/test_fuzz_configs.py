"""Any config, override and manifest: a valid one, or one line of `InputError`; never more."""

import hashlib
import json
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from reference.mutations import JUNK, config_texts, damaged, overrides

from agcl.errors import InputError
from pipeline.config import loading
from pipeline.config.config import Config
from pipeline.run import open_run
from pipeline.storage import artifact
from pipeline.storage.artifact import CorruptArtifact

ROOT = Path(__file__).parents[3]
ROWS = Path("rows.jsonl")
SECTIONS = {
    "tasks": {
        "format": "jsonl",
        "prompt": "{prompt}\n",
        "sequence": [
            {"name": "one", "train": "rows.jsonl"},
            {"name": "two", "train": "rows.jsonl"},
        ],
    },
    "model": {"path": "builtin", "pretraining": {"entities": 3}},
    "importance": {"estimator": "lrp", "top_k": 2, "samples": None},
    "protect": [{"kind": "gate", "strength": 0.5}, {"kind": "project", "energy": 0.5}],
    "freeze": {"layers": [0, 1]},
    "adapter": {"rank": 2},
    "search": {"space": {"protect.0.strength": {"type": "choice", "values": [1, None]}}},
}
TREES = [
    *(yaml.safe_load(f.read_text()) for f in sorted((ROOT / "jobs" / "configs").glob("*.yaml"))),
    {"name": "tiny", "tasks": {"format": "facts", "count": 2, "entities": 3}},
    *({"name": "mine", "seed": 1, "storage": "out", key: value} for key, value in SECTIONS.items()),
    {"name": "all", **SECTIONS, "tracking": {"uri": "sqlite:///x.db", "register_model": "m"}},
]
KEYS = sorted(
    ".".join(map(str, path))
    for tree in TREES
    for path in [
        *((key,) for key in tree),
        *((k, i) for k, v in tree.items() if isinstance(v, dict) for i in v),
        *(("protect", 0, k) for k in ("kind", "strength", "energy")),
    ]
)
MOST_ROWS = 2000
"""Of configs with more built-in rows the inputs are not opened: reading them is what takes long."""
fuzz = settings(suppress_health_check=list(HealthCheck), deadline=None)


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        ROWS.write_text('{"prompt": "a", "answer": " b"}\n' * 3)
        yield folder


def load(content, settings):
    """The config, or None after one line of `InputError`."""
    file = Path("config.yaml")
    file.write_bytes(content)
    config, said = None, "valid"
    try:
        config = loading.load(file, settings)
    except InputError as error:
        said = str(error)
    assert 0 < len(said) < 5_000
    return config


def is_small(config):
    tasks = config.tasks
    rows = config.model.pretraining.entities
    if tasks.format == "facts":
        rows += tasks.count * tasks.entities
    return rows < MOST_ROWS


@fuzz
@given(content=config_texts(TREES), settings=overrides(KEYS))
def test_a_config_is_valid_or_refused_in_one_line(place, content, settings):
    config = load(content, settings)
    assert {path.name for path in place.iterdir()} <= {"config.yaml", ROWS.name}
    if config is None:
        return
    assert load(loading.dump(config).encode(), []) == config
    assert config.storage.root.is_absolute()
    if is_small(config):
        with suppress(InputError):
            resolved = open_run(config).resolved.values()
            assert {stage.folder.parent for stage in resolved} == {config.storage.root / "stages"}
            assert not any(stage.folder.name in ("", ".", "..") for stage in resolved)


@fuzz
@given(content=st.binary(max_size=200))
@example(content=b"[" * 3000)
def test_any_bytes_are_a_config_or_refused_in_one_line(content):
    load(content, [])


@fuzz
@given(tree=st.dictionaries(st.sampled_from([*Config.model_fields, "more"]), JUNK, max_size=4))
def test_any_sections_are_a_config_or_refused_in_one_line(tree):
    load(yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass"), [])


def write(folder, manifest):
    folder.mkdir(exist_ok=True)
    (folder / "a.txt").write_text("one")
    (folder / "manifest.json").write_bytes(manifest)
    return folder


WHOLE = {
    "fingerprint": "f00d",
    "files": {"a.txt": {"bytes": 3, "sha256": hashlib.sha256(b"one").hexdigest()}},
}
VALUES = JUNK.map(lambda value: json.loads(json.dumps(value, default=str)))


@fuzz
@given(
    manifest=st.one_of(
        damaged(json.dumps(WHOLE, indent=1).encode()),
        st.binary(max_size=50),
        VALUES.map(lambda value: json.dumps(value).encode()),
        st.fixed_dictionaries({}, optional={"fingerprint": VALUES, "files": VALUES}).map(
            lambda changed: json.dumps({**WHOLE, **changed}).encode()
        ),
        st.dictionaries(st.text(max_size=5), VALUES, max_size=2).map(
            lambda files: json.dumps({**WHOLE, "files": files}).encode()
        ),
    )
)
@example(manifest=b"[" * 100_000)
@example(manifest=json.dumps({**WHOLE, "files": {"a\0": {"bytes": 1, "sha256": ""}}}).encode())
def test_a_manifest_is_whole_or_its_artifact_corrupt(place, manifest):
    folder = write(place.parent / f"{place.name}-artifact", manifest)
    complete, said = False, str(folder)
    try:
        complete = artifact.is_complete(folder, "f00d")
        artifact.verify(folder)
    except CorruptArtifact as error:
        complete, said = False, str(error)
    assert str(folder) in said
    assert not complete or json.loads(manifest)["fingerprint"] == "f00d"
