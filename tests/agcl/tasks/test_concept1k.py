"""The Concept-1K format, on small generated files and, if available, the real one."""

import json
import os
import random
from pathlib import Path

import pytest

from agcl.errors import InputError
from agcl.tasks import TEST, TRAIN, Row, check_rows, concept1k

FULL_DATA = os.environ.get("AGCL_CONCEPT1K")


def block(concept, number, last_label="Q2"):
    return (
        f"({concept}, UsedFor, Thing, with comma {number})\n"
        f"Q1: What is {concept} for: case {number}?\nA1: thing {number}\n"
        f"Q2: Why {concept} {number}?\n{last_label}: thing {number}\n"
    )


def write(folder, *blocks, encoding="utf-8"):
    file = folder / "dataset.txt"
    file.write_bytes("".join(blocks).encode(encoding))
    return file


def test_rows_of_a_task_with_question_and_paraphrase(tmp_path):
    blocks = block("Tea", 1), block("Gold", 2, "A2"), block("Tea", 3), block("Last", 4)
    task = concept1k.task(0, write(tmp_path, *blocks))
    # The last block is dropped, as in the reference parser.
    assert list(task.splits[TRAIN]()) == [
        Row("Question: What is Tea for: case 1?\n Short Answer:", " thing 1"),
        Row("Question: What is Gold for: case 2?\n Short Answer:", " thing 2"),
        Row("Question: What is Tea for: case 3?\n Short Answer:", " thing 3"),
    ]
    assert [row.prompt for row in task.splits[TEST]()] == [
        "Question: Why Tea 1?\n Short Answer:",
        "Question: Why Gold 2?\n Short Answer:",
        "Question: Why Tea 3?\n Short Answer:",
    ]
    assert [row.answer for row in task.splits[TEST]()] == [" thing 1", " thing 2", " thing 3"]
    assert task.scored == {"memorization": TRAIN, "generalization": TEST}


def test_concepts_are_shuffled_into_one_task_of_105_and_then_of_102(tmp_path):
    names = [f"C{i}" for i in range(105 + 102 + 3)]
    file = write(tmp_path, *(block(name, 0) for name in [*names, "dropped"]))
    order = list(range(len(names)))
    random.seed(1)
    random.shuffle(order)
    expected = [names[i] for i in order]

    def concepts(task):
        return {row.prompt.split()[3] for row in task.splits[TRAIN]()}

    tasks = [concept1k.task(index, file) for index in range(3)]
    parts = expected[:105], expected[105:207], expected[207:]
    assert [concepts(task) for task in tasks] == [set(part) for part in parts]
    few = [concept1k.task(index, file, concepts_per_task=4) for index in range(2)]
    assert [concepts(task) for task in few] == [set(part[:4]) for part in parts[:2]]
    assert len({task.name for task in tasks}) == 3


@pytest.mark.parametrize(
    ("broken", "line"),
    [
        ("(Tea, UsedFor)\nQ1: a\nA1: b\nQ2: c\nQ2: b\n", 6),
        ("(Tea, UsedFor, X)\nQ1: a\nA1: b\nQ2: c\n", 6),
        ("(Tea, UsedFor, X)\nA1: b\nQ1: a\nQ2: c\nQ2: b\n", 6),
        ("(Tea, UsedFor, X)\nQ1: a\nA1: b\nQ2: c\nQ2: other\n", 6),
    ],
    ids=["header", "missing line", "order", "answers differ"],
)
def test_a_malformed_block_is_named_by_its_line(tmp_path, broken, line):
    file = write(tmp_path, block("Gold", 1), broken, block("Last", 2))
    with pytest.raises(InputError, match=rf"dataset\.txt, line {line}"):
        concept1k.read(file)


def test_a_file_whose_content_changed_is_read_anew(tmp_path):
    for name in ("Tea", "Mud"):
        file = write(tmp_path, block(name, 1), block("Last", 2))
        os.utime(file, (1_700_000_000, 1_700_000_000))
        assert [fact.concept for fact in concept1k.read(file)] == [name]


def test_missing_empty_and_undecodable_files_are_named(tmp_path):
    with pytest.raises(InputError, match=r"dataset\.txt"):
        concept1k.read(tmp_path / "dataset.txt")
    for folder in ("empty", "latin"):
        (tmp_path / folder).mkdir()
    with pytest.raises(InputError, match=r"dataset\.txt.*no \(Concept"):
        concept1k.read(write(tmp_path / "empty", "hello\n"))
    with pytest.raises(InputError, match=r"dataset\.txt.*UTF-8"):
        concept1k.read(write(tmp_path / "latin", block("Café", 1), encoding="latin-1"))


@pytest.mark.skipif(not FULL_DATA, reason="AGCL_CONCEPT1K does not name the benchmark's folder")
def test_the_benchmark_is_split_like_the_reference_code():
    folder = Path(FULL_DATA)
    tasks = [concept1k.task(index, folder / "dataset.txt") for index in range(10)]
    sizes = [check_rows(task, TRAIN) for task in tasks]
    assert sizes == [1698, 1694, 1643, 1633, 1698, 1618, 1667, 1688, 1670, 1644]
    assert sum(sizes) == 16_653
    assert [check_rows(task, TEST) for task in tasks] == sizes
    reference = json.loads((folder / "continual_config.json").read_text())["CONCEPT_LIST"]
    split = concept1k.task_concepts(concept1k.read(folder / "dataset.txt"))
    assert [concept for task in split for concept in task] == reference
    assert [len(task) for task in split] == [105] + [102] * 9
