"""Any damaged task or importance file is read correctly or named in an `InputError`."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from reference import chat
from reference.moments import matrices, whole
from reference.mutations import JUNK, _places, damaged

from agcl.errors import InputError
from agcl.importance import Importance, check_file
from agcl.tasks import TRAIN, Row, cl_benchmark, concept1k, files, super_ni, trace
from agcl.tasks.layouts import LAYOUTS

fuzz = settings(suppress_health_check=list(HealthCheck), deadline=None)

FACTS = "".join(
    f"(thing{i}, IsA, kind)\nQ1: What is {i}?\nA1: It{i}\nQ2: And {i}?\nQ2: It{i}\n"
    for i in range(4)
).encode()
PAIRS = [{"prompt": f"Wo ist {i}?", "answer": f"Da, {i} é"} for i in range(3)]
LABELLED = [{"label": "Good", "sentence": "fine"}, {"label": "-", "sentence": "hm"}]
INSTRUCTED = {
    "Definition": ["Say where."],
    "Instances": [{"input": "Wo?", "output": ["Da", "Hier"]}, {"input": "Wer?", "output": "Ada"}],
}
JSON_VALUES = JUNK.map(lambda value: json.loads(json.dumps(value, default=str)))
TALKS = [{"messages": chat.MESSAGES}, {"messages": chat.CALLS, "tools": chat.TOOLS}]
SHARED = (
    "sharegpt",
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
)


def parquet(rows):
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in PAIRS).encode()
TABLE = parquet(PAIRS)
LIST = json.dumps(PAIRS).encode()


def cl_files(folder, **contents):
    found = {}
    for name, content in {
        "train": json.dumps(LABELLED).encode(),
        "test": b"[]",
        "labels": b'["Good", "Bad"]',
        "instructions": b'{"SC": [{"instruction": "Which?"}]}',
        **contents,
    }.items():
        found[name] = folder / f"{name}.json"
        found[name].write_bytes(content)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def rows_of(folder, kind, content):
    """All rows of a file of that format."""
    file = folder / f"damaged.{kind}"
    if kind in ("train", "labels", "instructions"):
        task = cl_benchmark.task("films", "SC", cl_files(folder, **{kind: content}))
        return list(task.splits[TRAIN]())
    file.write_bytes(content)
    match kind:
        case "concepts":
            return [
                row
                for index in range(concept1k.NUM_TASKS)
                for row in concept1k.task(index, file).splits[TRAIN]()
            ]
        case "json":
            return list(trace.task("FOMC", {TRAIN: file}).splits[TRAIN]())
        case "super_ni":
            return list(super_ni.task("task1_a", {TRAIN: file}).splits[TRAIN]())
        case _:
            rendering = {"format": kind, "prompt": "{prompt}", "answer": "{answer}"}
            if kind in LAYOUTS:
                rendering = {"format": "jsonl", "layout": kind}
            return list(files.task("mine", {TRAIN: file}, **rendering).splits[TRAIN]())


def check(folder, kind, content):
    found, message = [], str(folder)
    try:
        found = rows_of(folder, kind, content)
    except InputError as error:
        message = str(error)
    assert str(folder) in message
    for row in found:
        assert isinstance(row, Row)
        "".join(
            (row.prompt, row.answer, *row.references)
        ).encode()  # Valid text that a tokenizer accepts.


WHOLE = {
    "concepts": FACTS,
    "json": LIST,
    "jsonl": LINES,
    "super_ni": json.dumps(INSTRUCTED).encode(),
    "train": json.dumps(LABELLED).encode(),
    "labels": b'["Good", "Bad"]',
    "instructions": b'{"SC": [{"instruction": "Which?"}]}',
    "csv": b'prompt,answer\n"Wo, ""hier""?",Da\nWann?,Jetzt\n',
    "messages": "".join(json.dumps(record) + "\n" for record in TALKS).encode(),
}


def test_intact_files_are_read(folder):
    for kind, content in {**WHOLE, "parquet": TABLE}.items():
        assert len(rows_of(folder, kind, content)) in (2, 3)


@fuzz
@given(
    st.sampled_from(sorted(WHOLE)).flatmap(
        lambda kind: st.tuples(st.just(kind), damaged(WHOLE[kind]))
    )
)
def test_a_damaged_task_file_is_read_or_named(folder, damage):
    check(folder, *damage)


@fuzz
@given(st.sampled_from(sorted(WHOLE)), st.one_of(st.binary(max_size=60), JSON_VALUES))
@example("json", [{"prompt": float("nan"), "answer": 1e400}])
def test_a_file_with_arbitrary_content_is_read_or_named(folder, kind, content):
    if not isinstance(content, bytes):
        content = json.dumps([content] if kind != "instructions" else content).encode()
    check(folder, kind, content)


@st.composite
def odd_records(draw):
    """A good conversation with a value somewhere in it exchanged."""
    layout, record = draw(st.sampled_from([("messages", r) for r in TALKS] + [SHARED]))
    record = json.loads(json.dumps(record))
    *path, key = draw(st.sampled_from([place for place in _places(record) if place]))
    parent = record
    for step in path:
        parent = parent[step]
    parent[key] = draw(JSON_VALUES)
    return layout, json.dumps(record).encode()


@fuzz
@given(odd_records())
def test_a_conversation_with_odd_values_is_read_or_named(folder, found):
    check(folder, *found)


@fuzz
@given(damaged(TABLE))
def test_a_damaged_parquet_file_is_read_or_named(folder, content):
    check(folder, "parquet", content)


SAVED = Importance(
    {"a.weight": torch.tensor([[1.5, -2.0], [0.25, 3.0]]), "b.weight": torch.ones(1, 3)},
    {"a.weight": whole(torch.eye(2))},
    {"rules": "attnlrp", "top_k": 4, "rows_attributed": 7},
)


def same(one, other):
    mine, theirs = ((dict(i.entries), matrices(i.moments)) for i in (one, other))
    return one.header == other.header and all(
        ours.keys() == others.keys() and all(torch.equal(ours[k], others[k]) for k in ours)
        for ours, others in zip(mine, theirs, strict=True)
    )


@pytest.fixture(scope="module")
def importance_file(folder):
    file = folder / "importance.safetensors"
    SAVED.save(file)
    return file, file.read_bytes()


def load_damaged(file, content):
    """Whether the file still loads; if so, it must hold what was saved."""
    file.write_bytes(content)
    loaded, message = None, str(file)
    try:
        loaded = Importance.load(file)
    except InputError as error:
        message = str(error)
    assert str(file) in message
    assert loaded is None or same(loaded, SAVED)
    return loaded is not None


@fuzz
@given(st.data())
def test_a_damaged_importance_loads_unchanged_or_is_named(folder, importance_file, data):
    _, content = importance_file
    load_damaged(folder / "damaged.safetensors", data.draw(damaged(content)))


def test_every_flipped_byte_of_an_importance_is_detected(folder, importance_file):
    _, content = importance_file
    loads = 0
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 0x10
        loads += load_damaged(folder / "flipped.safetensors", changed)
    # Whitespace between the file's header and its values may turn into other whitespace.
    assert loads <= 8


def test_a_flipped_value_is_detected_before_any_work(folder, importance_file):
    file, content = folder / "past.safetensors", importance_file[1]
    linears = {"a.weight": torch.nn.Linear(2, 2), "b.weight": torch.nn.Linear(3, 1)}
    file.write_bytes(content)
    check_file(file, linears)
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InputError, match=r"past\.safetensors: damaged"):
        check_file(file, linears)
