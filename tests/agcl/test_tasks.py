"""Checks of task names and rows, and tasks from JSON lines."""

import json
import pickle

import pytest

from agcl.errors import InputError
from agcl.tasks import TEST, TRAIN, Row, Task, check_names, check_rows, jsonl


def task_of(*rows, name="north"):
    return Task(name=name, splits={TRAIN: lambda: iter(rows)})


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b", "a\0b", "/"])
def test_a_name_that_is_no_folder_name_is_refused_with_its_place(name):
    with pytest.raises(InputError, match="task 2"):
        check_names(["first", name])


def test_a_repeated_name_is_refused_and_shown():
    with pytest.raises(InputError, match=r"task 3.*'north'"):
        check_names(["north", "south", "north"])


def test_ordinary_names_pass():
    check_names([])
    check_names(["north", "North-2", "C-STANCE", "20Minuten", ".hidden", "ünï code", "..."])


def test_rows_are_counted():
    assert check_rows(task_of(Row("a", "b"), Row("c", "d")), TRAIN) == 2


@pytest.mark.parametrize(
    ("row", "what"),
    [(Row("a", ""), "answer"), (Row("a", " \n"), "answer"), (Row(" ", "b"), "prompt")],
)
def test_an_empty_prompt_or_answer_names_task_split_and_row(row, what):
    with pytest.raises(InputError, match=rf"north.*train row 3.*{what}"):
        check_rows(task_of(Row("a", "b"), Row("c", "d"), row, Row("e", "f")), TRAIN)


def test_a_split_without_rows_is_refused():
    with pytest.raises(InputError, match=r"north.*train.*no rows"):
        check_rows(task_of(), TRAIN)


GOOD = json.dumps({"prompt": "2+2=", "answer": " 4", "more": [1]}).encode()


def write(path, *lines):
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def load(train, test=None, prompt_key="prompt", answer_key="answer"):
    return jsonl.task("sums", train, test, prompt_key=prompt_key, answer_key=answer_key)


def test_rows_of_both_files_under_the_users_keys(tmp_path):
    train = write(
        tmp_path / "a.jsonl", b'{"q": "1+1=", "a": "2"}', b"", '{"q": "é?", "a": "ü"}'.encode()
    )
    test = write(tmp_path / "b.jsonl", b'{"q": "one and one?", "a": "2"}')
    task = load(train, test, "q", "a")
    assert list(task.splits[TRAIN]()) == [Row("1+1=", "2"), Row("é?", "ü")]
    assert list(task.splits[TEST]()) == [Row("one and one?", "2")]
    assert task.scored == {TEST: TEST}
    again = pickle.loads(pickle.dumps(task))
    assert list(again.splits[TRAIN]()) == list(task.splits[TRAIN]())


def test_without_a_test_file_the_training_rows_are_scored(tmp_path):
    task = load(write(tmp_path / "a.jsonl", GOOD))
    assert task.scored == {"memorization": TRAIN}
    assert set(task.splits) == {TRAIN}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"prompt": "a", "answer": ', "not JSON"),
        (b"prompt,answer", "not JSON"),
        (b'{"prompt": "a"}', "'answer'"),
        (b'{"answer": "a"}', "'prompt'"),
        (b'{"prompt": "a", "answer": ""}', "'answer'"),
        (b'{"prompt": "a", "answer": "  "}', "'answer'"),
        (b'{"prompt": "a", "answer": 4}', "'answer'"),
        (b'{"prompt": null, "answer": "b"}', "'prompt'"),
        (b'["a", "b"]', "not a JSON object"),
        (b'"a"', "not a JSON object"),
        (b'{"prompt": "a", "answer": "\xff"}', "UTF-8"),
        (b'{"prompt": "a", "answer": "\\ud800"}', ""),
        (b'{"prompt": "a", "answer": ' + b"1" * 5000 + b"}", ""),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_a_bad_line_is_refused_with_file_and_number(tmp_path, line, reason):
    task = load(write(tmp_path / "sums.jsonl", GOOD, b"", line, GOOD))
    with pytest.raises(InputError, match=rf"sums\.jsonl, line 3.*{reason}"):
        check_rows(task, TRAIN)


@pytest.mark.parametrize("split", [TRAIN, TEST])
def test_a_missing_file_is_named_before_any_row_is_read(tmp_path, split):
    there, gone = write(tmp_path / "a.jsonl", GOOD), tmp_path / "gone.jsonl"
    with pytest.raises(InputError, match=rf"sums.*{split}.*gone\.jsonl"):
        load(*((gone, there) if split == TRAIN else (there, gone)))
