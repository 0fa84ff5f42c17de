"""TRACE and the O-LoRA benchmark, from small files in their layouts."""

import json

import pytest

from agcl.errors import InputError
from agcl.scoring.scorers import SCORERS
from agcl.tasks import TEST, TRAIN, VALIDATION, Row, check_rows, cl_benchmark, trace

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
