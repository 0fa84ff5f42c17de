"""Layouts of records, and the types of files that hold them."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from reference import chat

from agcl.errors import InputError
from agcl.tasks import TRAIN, files, huggingface, messages

ASKED, SAID = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me"}
TALK = [ASKED, SAID, {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes"}]


def rows_of(path, format="any", **settings):
    task = files.task("one", {"train": path}, format=format, **settings)
    return list(task.splits[TRAIN]())


@pytest.fixture
def rows(tmp_path):
    """Writes records as JSON lines; the rows of a layout."""

    def of(layout, *records, **settings):
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        return rows_of(file, layout=layout, **settings)

    return of


def test_messages_and_tools(rows):
    [plain, calls] = rows(
        "messages", {"messages": TALK}, {"messages": chat.CALLS, "tools": chat.TOOLS}
    )
    assert plain == messages.row_of(TALK, None, "")
    assert calls == messages.row_of(chat.CALLS, chat.TOOLS, "")
    assert (plain.prompt, plain.answer) == ("Who?\nMe\nSure?", "Yes")


def test_prompt_and_completion_are_texts_as_they_are_or_messages(rows):
    text, talk = rows(
        "prompt_completion",
        {"prompt": "Who? ", "completion": "Me"},
        {"prompt": TALK[:3], "completion": TALK[3:]},
    )
    assert (text.prompt, text.answer, text.conversation) == ("Who? ", "Me", None)
    assert talk == messages.row_of(TALK, None, "", context=3)


def test_prompt_and_completion_may_be_messages_as_json_text(rows):
    """As CSV and Parquet hold them; other text that is JSON stays text."""
    as_text = {"prompt": json.dumps(TALK[:3]), "completion": json.dumps(TALK[3:])}
    talk, text = rows("prompt_completion", as_text, {"prompt": "[1, 2]", "completion": "[3]"})
    assert talk == messages.row_of(TALK, None, "", context=3)
    assert (text.prompt, text.answer, text.conversation) == ("[1, 2]", "[3]", None)
    with pytest.raises(InputError, match="'prompt' is a list and 'completion' text"):
        rows("prompt_completion", {**as_text, "completion": "Yes"})


def test_conversations_may_be_messages(rows):
    [talk] = rows("sharegpt", {"conversations": TALK})
    assert talk == messages.row_of(TALK, None, "")


def test_alpaca_with_and_without_input_and_chat_template(rows):
    records = [
        {"instruction": "Add.", "input": "2 and 3", "output": "5"},
        {"instruction": "Greet.", "input": "", "output": "Hi"},
        {"instruction": "Greet.", "output": "Hi"},
    ]
    with_input, without, absent = rows("alpaca", *records)
    assert with_input.prompt == (
        "Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n2 and 3\n\n### Response:\n"
    )
    assert with_input.answer == "5"
    assert without == absent
    assert without.prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nGreet.\n\n### Response:\n"
    )
    assert [row.prompt for row in rows("alpaca", *records, chat=True)] == [
        "Add.\n\n2 and 3",
        "Greet.",
        "Greet.",
    ]


def test_sharegpt_is_the_same_conversation(rows):
    turns = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Me"}]
    [plain, framed] = rows(
        "sharegpt", {"conversations": turns}, {"conversations": turns, "system": "Be brief."}
    )
    assert plain == messages.row_of([ASKED, SAID], None, "")
    system = {"role": "system", "content": "Be brief."}
    assert framed == messages.row_of([system, ASKED, SAID], None, "")


@pytest.mark.parametrize(
    ("layout", "record", "said"),
    [
        ("messages", {"text": "a"}, "line 1: no column 'messages' (columns: text)"),
        ("messages", {"messages": [ASKED]}, "line 1: no assistant message"),
        ("prompt_completion", {"prompt": "a"}, "line 1: no column 'completion'"),
        ("prompt_completion", {"prompt": [ASKED], "completion": "Me"}, "line 1: 'prompt' is a li"),
        ("prompt_completion", {"prompt": TALK, "completion": [ASKED]}, "no assistant message"),
        ("prompt_completion", {"prompt": "a", "completion": None}, "'completion' is null"),
        ("alpaca", {"instruction": "a"}, "line 1: no column 'output'"),
        ("sharegpt", {"conversations": "a"}, "line 1: 'conversations' is text, not a list"),
        ("sharegpt", {"conversations": ["a"]}, "line 1, message 1 is text, not an object"),
        ("sharegpt", {"conversations": [{"from": "me"}]}, "message 1: from must be one of human"),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": 5}, {"from": "gpt"}]},
            "line 1, message 2: 'content' is null",
        ),
    ],
)
def test_a_bad_record_is_named_with_file_and_line(rows, layout, record, said):
    with pytest.raises(InputError) as error:
        rows(layout, record)
    assert said in str(error.value)
    assert "rows.jsonl, line 1" in str(error.value)


@pytest.mark.parametrize(
    ("record", "layout"),
    [
        ({"messages": TALK}, "messages"),
        ({"conversations": []}, "sharegpt"),
        ({"prompt": "a", "completion": "b"}, "prompt_completion"),
        ({"instruction": "a", "output": "b"}, "alpaca"),
    ],
)
def test_a_record_without_the_templates_columns_is_taken_for_another_layout(rows, record, layout):
    with pytest.raises(InputError, match=rf"no column .*; is its layout {layout}\?$"):
        rows("template", record, prompt="{prompt}", answer="{answer}")


def test_every_type_of_file_gives_the_same_rows(tmp_path):
    records = [{"messages": TALK}, {"messages": [ASKED, SAID]}]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.json").write_text(json.dumps(records, indent=1))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "d.parquet")
    texts = [json.dumps(r["messages"]).replace('"', '""') for r in records]
    (tmp_path / "e.csv").write_text("messages\n" + "".join(f'"{text}"\n' for text in texts))
    expected = rows_of(tmp_path / "a.jsonl", layout="messages")
    for file in sorted(tmp_path.iterdir()):
        assert rows_of(file, layout="messages") == expected, file
    assert len(rows_of(tmp_path, layout="messages")) == 2 * 5
    Dataset.from_list(records).save_to_disk(tmp_path / "saved")
    settings = {"subset": None, "revision": None, "layout": "messages"}
    task = huggingface.task("one", str(tmp_path / "saved"), {"train": "train"}, **settings)
    assert list(task.splits[TRAIN]()) == expected


def test_keys_that_a_table_adds_to_nested_objects_are_left_out(tmp_path):
    calls = [{"city": "Rome"}, {"unit": "C"}]
    records = [
        {"messages": [ASKED, {**SAID, "tool_calls": [{"function": {"arguments": each}}]}]}
        for each in calls
    ]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "d.parquet")
    Dataset.from_list(records).save_to_disk(tmp_path / "saved")
    settings = {"subset": None, "revision": None, "layout": "messages"}
    task = huggingface.task("one", str(tmp_path / "saved"), {"train": "train"}, **settings)
    for rows in (rows_of(tmp_path / "d.parquet", layout="messages"), task.splits[TRAIN]()):
        said = [row.conversation.messages[-1]["tool_calls"][0] for row in rows]
        assert said == [{"function": {"arguments": each}} for each in calls]


@pytest.mark.parametrize(("format", "ends"), [("jsonl", ["jsonl", "json", "ndjson.gz"]),
                                              ("csv", ["csv", "csv.gz", "CSV"])])  # fmt: skip
def test_a_folder_of_one_format_has_files_of_all_its_endings(tmp_path, format, ends):
    content = b'{"prompt": "a", "answer": "b"}\n' if format == "jsonl" else b"prompt,answer\na,b\n"
    for number, end in enumerate(ends):
        packed = gzip.compress(content) if end.endswith("gz") else content
        (tmp_path / f"{number}.{end}").write_bytes(packed)
    (tmp_path / "notes.txt").write_text("no rows")
    texts = {"prompt": "{prompt}", "answer": "{answer}"}
    assert len(rows_of(tmp_path, format, **texts)) == 3


def test_a_damaged_gzip_file_is_named(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(b"\x1f\x8bx")
    with pytest.raises(InputError, match=r"a\.jsonl\.gz: not readable"):
        rows_of(tmp_path / "a.jsonl.gz", layout="messages")


def test_csv_is_text_as_it_is_written(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_bytes('\ufeffprompt,answer\r\n007,1.50\r\n\r\n"a, ""b""\nc",None\r\n'.encode())
    texts = {"prompt": "{prompt}", "answer": "{answer}"}
    assert [(r.prompt, r.answer) for r in rows_of(file, "csv", **texts)] == [
        ("007", "1.50"),
        ('a, "b"\nc', "None"),
    ]
    (tmp_path / "rows.tsv").write_text("prompt\tanswer\na,b\t c\n")
    assert [r.prompt for r in rows_of(tmp_path / "rows.tsv", "csv", **texts)] == ["a,b"]
    (tmp_path / "long.csv").write_text(f"prompt,answer\n{'x' * 200_000},b\n")
    assert len(rows_of(tmp_path / "long.csv", "csv", **texts)[0].prompt) == 200_000


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"prompt,answer,prompt\na,b,c\n", "rows.csv: the header names the column 'prompt' twice"),
        (b"prompt,answer\na\n", "rows.csv, line 2: 1 fields, but 2 columns in the header"),
        (b"prompt,answer\na,b,c\n", "rows.csv, line 2: 3 fields, but 2 columns in the header"),
        (b'prompt,answer\n"a,b\n', "rows.csv, line 2: not CSV (unexpected end of data)"),
        (b"prompt,answer\n\xff,b\n", "rows.csv: not UTF-8 text"),
        (b"prompt,label\na,b\n", "rows.csv, line 2: no column 'answer' (columns: prompt, label)"),
        (b"\x1f\x8bx", "rows.csv: not readable"),
    ],
)
def test_bad_csv_is_named_with_its_line(tmp_path, content, said):
    file = tmp_path / "rows.csv"
    file.write_bytes(content)
    with pytest.raises(InputError) as error:
        rows_of(file, "csv", prompt="{prompt}", answer="{answer}")
    assert said in str(error.value)


def test_a_folder_has_its_splits_by_name_whatever_their_type(tmp_path):
    (tmp_path / "train.jsonl.gz").touch()
    (tmp_path / "test.csv").touch()
    found = files.in_folder(tmp_path, "any")
    assert {split: file.name for split, file in found.items()} == {
        "train": "train.jsonl.gz",
        "test": "test.csv",
    }
    assert files.in_folder(tmp_path, "jsonl")["train"].name == "train.jsonl.gz"
    assert files.in_folder(tmp_path / "none", "jsonl")["train"].name == "train.jsonl"
    (tmp_path / "train.parquet").touch()
    with pytest.raises(InputError, match=r"both train\.jsonl\.gz and train\.parquet; name one"):
        files.in_folder(tmp_path, "any")


def test_tabs_separate_whatever_the_case_of_the_ending(tmp_path):
    (tmp_path / "rows.TSV").write_text("prompt\tanswer\na, b\tc\n")
    texts = {"prompt": "{prompt}", "answer": "{answer}"}
    [row] = rows_of(tmp_path / "rows.TSV", "csv", **texts)
    assert (row.prompt, row.answer) == ("a, b", "c")
