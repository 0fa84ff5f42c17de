"""`agcl init`: a config that `agcl run` takes as it is, from a model and data files."""

import csv
import json
from pathlib import Path

import pytest
from reference import chat

from jobs import cli, init
from pipeline.config import loading
from pipeline.run import open_run

TURNS = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]
SHARED = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Me."}]
ROW = {"prompt": "Who?", "answer": "Me"}
LONG = "It is a long answer that nobody would write in the very same words again, whoever it was."


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory):
    return chat.folder(tmp_path_factory.mktemp("chat"))


def written(file, rows):
    file.parent.mkdir(exist_ok=True)
    if file.suffix == ".csv":
        with file.open("w", newline="") as lines:
            writer = csv.DictWriter(lines, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows))
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        ("talk.jsonl", {"messages": TURNS}, {"format": "messages"}),
        ("talk.json", {"conversations": SHARED}, {"format": "sharegpt"}),
        ("a.json", {"instruction": "Add", "input": "1", "output": "2"}, {"format": "alpaca"}),
        ("p.jsonl", {"prompt": "Who?", "completion": " Me"}, {"format": "prompt_completion"}),
        (
            "q.csv",
            {"id": "7", "question": "Who?", "response": "Me"},
            {"format": "csv", "prompt": "{question}", "answer": " {response}"},
        ),
        (
            "t.jsonl",
            {"text": "Who?\n", "label": LONG},
            {"format": "jsonl", "prompt": "{text}", "answer": "{label}", "scorer": "rouge_l"},
        ),
    ],
)
def test_a_config_tells_what_the_columns_are(agcl, chat_folder, name, row, expected):
    written(agcl.place / name, [row] * 9)
    assert agcl("init", chat_folder, name) == (cli.OK, [])
    file = agcl.place / "config.yaml"
    config = loading.load(file)
    tasks = config.tasks.model_dump()
    expected = {"scorer": "exact_match", **expected}
    assert {key: tasks[key] for key in expected} == expected
    assert config.name == name.partition(".")[0]
    longest = int(file.read_text().partition("the longest ")[2].partition(".")[0])
    assert longest <= config.tasks.max_length < longest + 64
    open_run(config)  # As `agcl run` does before any work.
    assert {path.name for path in agcl.place.iterdir()} == {name, "config.yaml"}


def test_a_folder_has_its_splits_and_every_file_is_a_task(agcl, model_folder):
    rows = [{"prompt": "Who?", "answer": "Me"}] * 9
    for split in ("train", "test"):
        written(agcl.place / "first" / f"{split}.jsonl", rows)
    written(agcl.place / "second" / "train.jsonl", rows)
    code, (line,) = agcl("init", model_folder, "first", "second", "--output", "own/start.yaml")
    assert code == cli.BAD_INPUT
    assert "first/train.jsonl has a test file beside it, but second/train.jsonl has none" in line
    assert not (agcl.place / "own").exists()
    written(agcl.place / "second" / "test.jsonl", rows)
    arguments = ("first", "second/train.jsonl", "--output", "own/start.yaml")
    assert agcl("init", model_folder, *arguments)[0] == cli.OK
    config = loading.load(agcl.place / "own" / "start.yaml")
    first, second = config.tasks.sequence
    assert (first.name, first.test) == ("first", agcl.place / "first" / "test.jsonl")
    assert (second.name, second.test) == ("second", agcl.place / "second" / "test.jsonl")
    assert not config.tasks.chat_template  # The model has none.


def test_a_file_has_the_test_file_that_is_named_like_it(agcl, model_folder):
    for name in ("a.jsonl", "a-test.jsonl", "b.v2.jsonl", "b_test.v2.jsonl"):
        written(agcl.place / name, [{"prompt": "Who?", "answer": "Me"}] * 9)
    files = sorted(path.name for path in agcl.place.glob("*.jsonl"))  # As a shell expands *.jsonl.
    code, lines = agcl("init", model_folder, *files)
    assert code == cli.OK, lines
    sequence = loading.load(agcl.place / "config.yaml").tasks.sequence
    assert [(task.name, task.test.name) for task in sequence] == [
        ("a", "a-test.jsonl"),
        ("b", "b_test.v2.jsonl"),
    ]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"a": "1", "b": "2"}], "columns a, b tell no prompt and answer"),
        ([], "no rows"),
        ([{"prompt": " ", "answer": ""}], "no row has a prompt and an answer"),
        ([{"messages": TURNS}], "chat template"),
        ([{"messages": [{"role": "user", "content": "Who?"}]}], "line 1: no assistant message"),
    ],
)
def test_data_that_tells_nothing_is_named_and_nothing_written(agcl, model_folder, rows, said):
    written(agcl.place / "d.jsonl", rows)
    code, (line,) = agcl("init", model_folder, "d.jsonl")
    assert code == cli.BAD_INPUT
    assert said in line
    assert [path.name for path in agcl.place.iterdir()] == ["d.jsonl"]


def test_rows_longer_than_the_model_takes_are_counted_or_refused(agcl, capsys, model_folder):
    long = {"prompt": "Who? " * 600, "answer": "Me"}
    written(agcl.place / "long.jsonl", [long] * 3)
    code, (line,) = agcl("init", model_folder, "long.jsonl")
    assert code == cli.BAD_INPUT
    assert "all rows have more tokens than the model has positions, 512" in line
    written(agcl.place / "some.jsonl", [long, *[{"prompt": "Who?", "answer": "Me"}] * 5])
    assert cli.main(["init", str(model_folder), "some.jsonl"]) == cli.OK
    assert "some: 1 of the 6 rows looked at have more than 512 tokens" in capsys.readouterr().out


def test_files_sorted_by_length_and_longer_test_rows_get_a_limit_that_fits(agcl, model_folder):
    rows = [{"prompt": "Who? " * (1 + n // 100), "answer": "Me"} for n in range(1200)]
    written(agcl.place / "a.jsonl", rows)
    written(agcl.place / "a-test.jsonl", [{"prompt": "Who? " * 60, "answer": "Me"}])
    assert agcl("init", model_folder, "a.jsonl") == (cli.OK, [])
    file = agcl.place / "config.yaml"
    longest = int(file.read_text().partition("the longest ")[2].partition(".")[0])
    assert 60 < longest <= loading.load(file).tasks.max_length < longest + 64


@pytest.mark.parametrize(
    ("row", "unused"),
    [
        ({"instruction": "Who?", "context": "A shop", "response": "Me"}, "context"),
        ({"question": "Who?", "context": "A", "answer": "Me", "id": 0, "x": None}, "context, id"),
        ({"instruction": "Who?", "input": "", "output": "Me", "system": "Hi", "a,\n: b": "c"},
         "system, 'a,\\n: b'"),
        ({"prompt": "Who?", "completion": "Me", "tools": None}, ""),
    ],
)  # fmt: skip
def test_columns_that_are_not_trained_on_are_named(agcl, capsys, model_folder, row, unused):
    written(agcl.place / "d.jsonl", [row] * 9)
    assert cli.main(["init", str(model_folder), "d.jsonl"]) == cli.OK
    shown, file = capsys.readouterr().out, agcl.place / "config.yaml"
    assert (f"d: columns that are not trained on: {unused}" in shown) == bool(unused)
    assert (f"# Columns that are not trained on: {unused}" in file.read_text()) == bool(unused)
    loading.load(file)


def test_several_formats_a_file_that_exists_and_no_model_are_named(agcl, model_folder):
    written(agcl.place / "a.jsonl", [{"prompt": "Who?", "answer": "Me"}] * 9)
    written(agcl.place / "b.jsonl", [{"question": "Who?", "answer": "Me"}] * 9)
    code, (line,) = agcl("init", model_folder, "a.jsonl", "b.jsonl")
    assert (code, "b.jsonl has another format than a.jsonl" in line) == (cli.BAD_INPUT, True)
    written(agcl.place / "sub" / "a.json", [{"prompt": "Who?", "answer": "Me"}] * 9)
    code, (line,) = agcl("init", model_folder, "a.jsonl", "sub/a.json")
    assert code == cli.BAD_INPUT
    code, (line,) = agcl("init", agcl.place / "none", "a.jsonl")
    assert (code, "no folder" in line) == (cli.BAD_INPUT, True)
    code, (line,) = agcl("init", model_folder, "c.jsonl")
    assert (code, "no file or folder c.jsonl" in line) == (cli.BAD_INPUT, True)
    code, (line,) = agcl("init", "builtin", "a.jsonl")
    assert (code, "agcl run facts" in line) == (cli.BAD_INPUT, True)
    assert agcl("init", model_folder, "a.jsonl")[0] == cli.OK
    code, (line,) = agcl("init", model_folder, "a.jsonl")
    assert (code, "config.yaml exists" in line) == (cli.BAD_INPUT, True)


@pytest.mark.parametrize(
    ("tasks", "name"),
    [(["a b"], "a-b"), (["x", "y", "z"], "x-z"), (["x", "x"], "x"), (["?"], "run")],
)
def test_a_run_is_named_after_its_first_and_last_task(tasks, name):
    assert init._run_name(tasks) == name


def test_init_pairs_files_that_are_given_with_a_leading_dot(agcl, model_folder):
    for name in ("a.jsonl", "a-test.jsonl"):
        written(agcl.place / name, [ROW] * 9)
    code, lines = agcl("init", model_folder, "./a-test.jsonl", "./a.jsonl")
    assert code == cli.OK, lines
    [task] = loading.load(agcl.place / "config.yaml").tasks.sequence
    assert (task.train.name, task.test.name) == ("a.jsonl", "a-test.jsonl")


@pytest.mark.parametrize("mark", "-_")
def test_init_pairs_a_train_and_a_test_file(agcl, model_folder, mark):
    for split in ("train", "test"):
        written(agcl.place / f"qa{mark}{split}.jsonl", [ROW] * 9)
    names = sorted(path.name for path in agcl.place.iterdir())
    assert agcl("init", model_folder, *names)[0] == cli.OK
    [task] = loading.load(agcl.place / "config.yaml").tasks.sequence
    assert (task.name, task.train.name) == ("qa", f"qa{mark}train.jsonl")
    assert task.test.name == f"qa{mark}test.jsonl"


def test_init_takes_the_train_file_that_is_named(agcl, model_folder):
    written(agcl.place / "train.csv", [ROW] * 9)
    for name in ("train.jsonl", "test.jsonl"):
        written(agcl.place / name, [ROW] * 9)
    assert agcl("init", model_folder, "train.jsonl") == (cli.OK, [])
    [task] = loading.load(agcl.place / "config.yaml").tasks.sequence
    assert (task.train.name, task.test.name) == ("train.jsonl", "test.jsonl")


@pytest.mark.parametrize("folder", [".", "\u2028\x85", "\"'{&\\: #", "z" * 120 + " " + "z" * 20])
@pytest.mark.parametrize("start", ["\U0001f994", "2024"])
def test_init_writes_paths_of_any_characters_and_long_names(agcl, model_folder, folder, start):
    files = [Path(folder) / f"{start}.jsonl", Path(folder) / f"{start}{'y' * 90}.jsonl"]
    for file in files:
        written(agcl.place / file, [ROW] * 9)
    assert agcl("init", model_folder, files[0], "--output", "one.yaml") == (cli.OK, [])
    # The name of a run is text, also if it looks like a number.
    assert loading.load(agcl.place / "one.yaml").name == ("2024" if start == "2024" else "run")
    assert agcl("init", model_folder, *files) == (cli.OK, [])
    config = loading.load(agcl.place / "config.yaml")
    assert [task.train for task in config.tasks.sequence] == [agcl.place / file for file in files]


def test_the_name_of_a_run_leaves_room_where_the_tasks_names_are_long():
    assert len(init._run_name(["a" * 100, "b" * 100])) == 80
