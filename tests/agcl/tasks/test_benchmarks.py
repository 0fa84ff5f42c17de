"""TRACE, the O-LoRA benchmark and SuperNI, from small files in their layouts."""

import json

import pytest

from agcl.errors import InputError
from agcl.scoring.scorers import SCORERS
from agcl.tasks import TEST, TRAIN, VALIDATION, Row, check_rows, cl_benchmark, super_ni, trace

INSTRUCTION = "What is the sentiment? Choose one from the option.\n"


def dump(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
    return file


@pytest.fixture
def sentiment(tmp_path):
    """Files of a set with two labels and two rows per split."""
    dump(tmp_path / "instruction_config.json", {"SC": [{"instruction": INSTRUCTION}]})
    rows = [{"label": "Good", "sentence": "fine"}, {"sentence": "dull", "label": "Bad"}]
    folder = tmp_path / "SC" / "films"
    dump(folder / "labels.json", ["Good", "Bad"])
    found = {part: dump(folder / f"{part}.json", rows) for part in (TRAIN, TEST)}
    return {
        **found,
        "labels": folder / "labels.json",
        "instructions": tmp_path / "instruction_config.json",
    }


def test_a_set_is_rendered_like_the_original(sentiment):
    task = cl_benchmark.task("films", "SC", sentiment)
    assert list(task.splits[TRAIN]()) == [
        Row(f"{INSTRUCTION}Option: Good, Bad \nfine\nAnswer:", " Good"),
        Row(f"{INSTRUCTION}Option: Good, Bad \ndull\nAnswer:", " Bad"),
    ]
    assert task.scorer == "olora_match"


def test_sets_are_found_by_name(sentiment, tmp_path):
    assert cl_benchmark.folders(tmp_path) == {"films": tmp_path / "SC" / "films"}
    with pytest.raises(InputError, match=r"tasks\.path.*instruction_config"):
        cl_benchmark.folders(tmp_path / "SC")


@pytest.mark.parametrize(
    ("part", "content", "reason"),
    [
        (
            TRAIN,
            [{"label": "Good", "sentence": "a"}, {"label": "Fair", "sentence": "b"}],
            "row 2.*Fair",
        ),
        (TRAIN, [{"label": "Good"}], r"train\.json, row 1: no column 'sentence'"),
        (TRAIN, [{"label": 3.5, "sentence": "b"}], "row 1.*'3.5'"),
        (TRAIN, {"label": "Good"}, r"train\.json: not a JSON list"),
        (TRAIN, [], "no rows"),
        ("labels", [], r"labels\.json: not a JSON list of labels"),
        ("labels", ["Good", 1], r"labels\.json"),
        ("labels", {"Good": 1}, r"labels\.json"),
        ("instructions", {}, r"instruction_config\.json: no instruction.*'SC'"),
        ("instructions", {"SC": []}, r"instruction_config\.json"),
        ("instructions", [], r"instruction_config\.json"),
        ("instructions", {"SC": [{"instruction": [1]}]}, "not text"),
    ],
)
def test_a_malformed_file_is_named(sentiment, part, content, reason):
    dump(sentiment[part], content)
    with pytest.raises(InputError, match=reason):
        check_rows(cl_benchmark.task("films", "SC", sentiment), TRAIN)


def test_a_trace_task_has_its_own_scorer_and_rows(tmp_path):
    rows = [{"prompt": "Stance?", "answer": "A"}, {"prompt": "Which? ", "answer": "B"}]
    files = {split: dump(tmp_path / name, rows) for split, name in trace.FILES.items()}
    task = trace.task("20Minuten", files)
    assert list(task.splits[VALIDATION]()) == [Row("Stance?", " A"), Row("Which? ", "B")]
    assert task.scorer == "sari"
    assert task.scored == {TEST: TEST}


def test_traces_orders_hold_every_task_once():
    assert sorted(trace.ORDERS[1]) == sorted(trace.ORDERS[2]) == sorted(trace.SCORERS)
    assert trace.ORDERS[1] != trace.ORDERS[2]
    assert set(trace.SCORERS.values()) <= set(SCORERS)


def test_a_malformed_trace_row_is_named(tmp_path):
    file = dump(tmp_path / "train.json", [{"prompt": "a", "answer": "b"}, {"prompt": "a"}])
    with pytest.raises(InputError, match=r"train\.json, row 2: no column 'answer'"):
        check_rows(trace.task("FOMC", {TRAIN: file, TEST: file}), TRAIN)


INSTANCES = [
    {"id": "task1-a", "input": " Who? ", "output": [" Me ", "I", "", " It's me"]},
    {"id": "task1-b", "input": "Where?", "output": "Here"},
    {"id": "task1-c", "input": " ", "output": ["Nowhere"]},
    {"id": "task1-d", "input": "When?", "output": ["", "Now"]},
]


def instructed(folder, instances=INSTANCES, definition=("Answer.", "Say it."), split=TRAIN):
    content = {"Definition": definition, "Instances": instances, "Categories": ["Question"]}
    return dump(folder / super_ni.FILES[split], content)


def test_a_super_ni_task_has_an_instruction_and_references(tmp_path):
    files = {split: instructed(tmp_path, split=split) for split in super_ni.FILES}
    task = super_ni.task("task1_who", files)
    rows = list(task.splits[TEST]())
    assert rows[:2] == [
        Row("Answer.\nInput: Who?\nOutput:", " Me", references=("I", "It's me"), kept=14),
        Row("Answer.\nInput: Where?\nOutput:", " Here", kept=14),
    ]
    assert [row.prompt[: row.kept] for row in rows] == ["Answer.\nInput:"] * 2 + [
        "",
        rows[3].prompt[:14],
    ]
    assert (task.scorer, task.scored) == ("rouge_l_stemmed", {TEST: TEST})
    assert check_rows(task, TRAIN) == 2  # Rows without an input or a first reference are skipped.


def test_super_ni_orders_are_found_by_the_numbers_of_folders(tmp_path):
    assert sorted(super_ni.ORDERS[1]) == sorted(super_ni.ORDERS[2])
    assert len(set(super_ni.ORDERS[1])) == 15
    for number in super_ni.ORDERS[1]:
        instructed(tmp_path / f"task{number}_some_{number}_thing")
    instructed(tmp_path / "task1572of_another_kind")
    found = super_ni.folders(tmp_path)
    for order, numbers in super_ni.ORDERS.items():
        names = super_ni.in_order(found, order)
        assert names == [f"task{number}_some_{number}_thing" for number in numbers]
    del found["task002_some_002_thing"]
    with pytest.raises(
        InputError, match=r"tasks\.path: no folder task002_<what>, a task of order 2"
    ):
        super_ni.in_order(found, 2)
    with pytest.raises(InputError, match=r"tasks\.path: no task<number>_<what>/train\.json in"):
        super_ni.folders(tmp_path / "task002_some_002_thing")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"instances": [*INSTANCES, {"input": "a"}]}, "instance 5: no column 'output'"),
        ({"instances": [{"output": "a"}]}, "instance 1: no column 'input'"),
        ({"instances": [{"input": "a", "output": []}]}, "instance 1: 'output' is an empty list"),
        ({"instances": [{"input": "a", "output": ["b", {}]}]}, "instance 1: 'output' is an object"),
        ({"instances": [{"input": ["a"], "output": "b"}]}, "instance 1: 'input' is a list"),
        ({"instances": ["a"]}, "instance 1: text, not a JSON object"),
        ({"instances": {}}, r"train\.json: 'Instances' is an object, not a list"),
        ({"instances": None}, r"train\.json: 'Instances' is null, not a list"),
        ({"instances": []}, "no rows"),
        ({"definition": []}, r"train\.json: 'Definition' is an empty list"),
        ({"definition": [3, None]}, r"train\.json: 'Definition' is null"),
    ],
)
def test_a_malformed_super_ni_file_is_named(tmp_path, changes, reason):
    file = instructed(tmp_path, **changes)
    with pytest.raises(InputError, match=reason):
        check_rows(super_ni.task("task1_who", {TRAIN: file}), TRAIN)
