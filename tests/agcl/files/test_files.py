"""Tasks from JSON Lines and Parquet, and the error for every malformed file."""

import gzip
import json
import pickle
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from agcl.errors import InputError
from agcl.tasks import TEST, TRAIN, VALIDATION, Row, check_rows, files, is_empty, records
from agcl.tasks.template import columns, render

GOOD = json.dumps({"prompt": "2+2=", "answer": " 4", "more": [1]}).encode()


def write(path, *lines):
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def task(train, test=None, format="jsonl", prompt="{prompt}", answer="{answer}"):
    found = {TRAIN: train, **({TEST: test} if test else {})}
    return files.task("sums", found, format=format, prompt=prompt, answer=answer)


def rows(task, split=TRAIN):
    return list(task.splits[split]())


def test_templates_render_the_rows_of_both_files(tmp_path):
    train = write(
        tmp_path / "a.jsonl", b'{"q": "1+1", "a": 2}', b"", '{"q": "é?", "a": "ü"}'.encode()
    )
    test = write(tmp_path / "b.jsonl", b'{"q": "one and one", "a": "2"}')
    found = task(train, test, prompt="Say {{it}}: {q}=", answer=" {a}")
    assert rows(found) == [Row("Say {it}: 1+1=", " 2"), Row("Say {it}: é?=", " ü")]
    assert rows(found, TEST) == [Row("Say {it}: one and one=", " 2")]
    assert found.scored == {TEST: TEST}
    assert not found.memorized
    assert rows(pickle.loads(pickle.dumps(found))) == rows(found)


def test_without_a_test_file_the_training_rows_are_scored(tmp_path):
    found = task(write(tmp_path / "a.jsonl", GOOD))
    assert found.scored == {"memorization": TRAIN}
    assert found.memorized
    assert set(found.splits) == {TRAIN}


def test_a_folder_means_its_files_in_name_order(tmp_path):
    for number in (2, 1, 3):
        write(tmp_path / f"part-{number}.jsonl", b'{"prompt": "%d", "answer": "a"}' % number)
    write(tmp_path / "notes.txt", b"not a record")
    assert [row.prompt for row in rows(task(tmp_path))] == ["1", "2", "3"]


def test_a_folder_without_such_files_is_named(tmp_path):
    write(tmp_path / "a.txt", GOOD)
    with pytest.raises(InputError, match=rf"{tmp_path}.*jsonl"):
        rows(task(tmp_path))


def test_parquet_and_json_lines_give_the_same_rows(tmp_path):
    table = pa.table({"q": ["a", "b", "c"] * 1000, "n": list(range(3000))})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=700)
    found = rows(task(tmp_path / "a.parquet", format="parquet", prompt="{q}", answer="{n}"))
    assert found == [Row("abc"[i % 3], str(i)) for i in range(3000)]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"prompt": "a", "answer": ', "not JSON"),
        (b"prompt,answer", "not JSON"),
        (b'{"prompt": "a"}', "no column 'answer' .columns: prompt."),
        (b'{"answer": "a"}', "'prompt'"),
        (b'{"prompt": "a", "answer": [4]}', "'answer' is a list"),
        (b'{"prompt": {"a": 1}, "answer": "4"}', "'prompt' is an object"),
        (b'{"prompt": null, "answer": "b"}', "'prompt' is null"),
        (b'["a", "b"]', "a list, not a JSON object"),
        (b'"a"', "not a JSON object"),
        (b'{"prompt": "a", "answer": "\xff"}', "UTF-8"),
        (b'{"prompt": "a", "answer": "\\ud800"}', "half a character"),
        (b'{"prompt": "a", "answer": NaN}', "not JSON .NaN is not valid JSON"),
        (b'{"prompt": "a", "answer": -Infinity}', "not JSON .-Infinity"),
        (b"{", "not JSON.*one object per line"),
        (b"[" * 100_000, "not JSON"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_a_bad_line_is_refused_with_file_and_number(tmp_path, line, reason):
    found = task(write(tmp_path / "sums.jsonl", GOOD, b"", line, GOOD))
    with pytest.raises(InputError, match=rf"sums\.jsonl, line 3.*{reason}"):
        check_rows(found, TRAIN)


@pytest.mark.parametrize(
    ("column", "reason"),
    [
        (pa.array([["x"], ["y"]]), r"row 1: 'answer' is a list"),
        (pa.array(["x", None]), r"row 2: 'answer' is null"),
        (pa.array([b"x", b"y"]), r"row 1: 'answer' is a bytes"),
        (pa.array([1.5, float("nan")]), r"row 2: 'answer' is NaN, a missing value"),
    ],
)
def test_a_bad_parquet_row_is_refused_with_its_number(tmp_path, column, reason):
    pq.write_table(pa.table({"prompt": ["a", "b"], "answer": column}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=rf"a\.parquet, {reason}"):
        check_rows(task(tmp_path / "a.parquet", format="parquet"), TRAIN)


def test_hidden_files_of_a_folder_are_not_read(tmp_path):
    write(tmp_path / "rows.jsonl", GOOD)
    for hidden in ("._rows.jsonl", ".rows.jsonl"):
        write(tmp_path / hidden, b"\0\5\x16\7")
    assert len(rows(task(tmp_path))) == 1


@pytest.mark.parametrize("lines", [(GOOD, GOOD), (b" [", GOOD, b",", GOOD, b"]")])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_json_lines_may_be_a_list_and_compressed(tmp_path, lines, mark, compress):
    (tmp_path / "a.jsonl").write_bytes(compress(mark + b"\n".join(lines)))
    assert rows(task(tmp_path / "a.jsonl")) == [Row("2+2=", " 4")] * 2


@pytest.mark.parametrize("format", ["jsonl", "json"])
def test_a_truncated_gzip_is_named(tmp_path, format):
    (tmp_path / "a").write_bytes(gzip.compress(GOOD * 1000)[:-20])
    with pytest.raises(InputError, match=r"/a: not readable \(Compressed file ended"):
        list(records.read(tmp_path / "a", format))


@pytest.mark.parametrize("content", [b"", b"PAR1", b"not parquet at all" * 10])
def test_an_invalid_parquet_file_is_named(tmp_path, content):
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.parquet: not readable as Parquet"):
        check_rows(task(tmp_path / "a.parquet", format="parquet"), TRAIN)


def test_a_truncated_parquet_file_is_named(tmp_path):
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": ["a"] * 5000, "answer": ["b"] * 5000}), file)
    broken = bytearray(file.read_bytes())
    broken[4:40] = b"\0" * 36
    file.write_bytes(broken)
    with pytest.raises(InputError, match=r"a\.parquet"):
        check_rows(task(file, format="parquet"), TRAIN)


def test_an_empty_file_has_no_rows(tmp_path):
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(InputError, match=r"sums.*train.*no rows"):
        check_rows(task(tmp_path / "a.jsonl"), TRAIN)


@pytest.mark.parametrize("split", [TRAIN, TEST, VALIDATION])
def test_a_missing_file_is_named_before_any_row_is_read(tmp_path, split):
    there, gone = write(tmp_path / "a.jsonl", GOOD), tmp_path / "gone.jsonl"
    found = {TRAIN: there, TEST: there, VALIDATION: there} | {split: gone}
    with pytest.raises(InputError, match=rf"sums.*{split}.*gone\.jsonl"):
        files.task("sums", found, format="jsonl", prompt="{prompt}", answer="{answer}")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1, 2", b"[" * 100_000])
def test_invalid_json_is_named(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.json.*not (JSON|UTF-8)"):
        list(records.read(tmp_path / "a.json", "json"))


@pytest.mark.parametrize("content", ['{"a": 1}', '"text"', "3", '["a"]', "[[1]]"])
def test_json_other_than_a_list_of_objects_is_named(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(InputError, match=r"a\.json(, row 1)?: .*not a JSON"):
        list(records.read(tmp_path / "a.json", "json"))


@pytest.mark.parametrize("template", ["{", "}", "a {b", "{}", "{0!r}", "{a:>3}", "{a}{}"])
def test_an_invalid_template_is_refused(template):
    with pytest.raises(InputError, match="template"):
        columns(template)


def test_braces_hold_a_column_name_and_never_an_attribute():
    record = {"a.b": "dot", "a[0]": "index", "text": "x"}
    assert columns("{a.b} {a[0]}") == ["a.b", "a[0]"]
    assert render("{a.b} {a[0]}", record, "here") == "dot index"
    with pytest.raises(InputError, match=r"here: no column 'text\.__class__'"):
        render("{text.__class__}", record, "here")


@pytest.mark.parametrize(
    ("question", "context", "answer", "empty"),
    [("q", "", "a", False), ("", " c", "a", False), ("", "\n ", "a", True), ("q", "c", " ", True)],
)
def test_a_row_is_empty_if_the_columns_of_a_template_are(question, context, answer, empty):
    record = {"q": question, "c": context, "a": answer}
    found = Row(render("Q {q} {c} A", record, ""), render(" It is {a}.", record, ""))
    assert is_empty(found) == empty
    assert not is_empty(Row(render("Sing!", record, ""), "la"))


def test_numbers_and_booleans_are_written_as_in_json():
    assert render("{a} {b} {c}", {"a": 1, "b": 0.5, "c": True}, "") == "1 0.5 true"


@pytest.mark.parametrize("number", ["0.00001", "1.50", "-0.0", "1E5", "9" * 5000], ids=len)
def test_a_number_in_json_keeps_its_literal(tmp_path, number):
    file = write(tmp_path / "a.jsonl", b'{"q": "how", "n": %s}' % number.encode())
    assert rows(task(file, prompt="{q}", answer=" {n}")) == [Row("how", f" {number}")]


def test_numbers_in_parquet_are_as_short_as_their_type_allows(tmp_path):
    table = {
        "single": pa.array([0.1], pa.float32()),
        "double": [0.1],
        "exact": pa.array([Decimal("1.50")]),
    }
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    prompt, answer = "{single} {double}", " {exact}"
    found = task(tmp_path / "a.parquet", format="parquet", prompt=prompt, answer=answer)
    assert rows(found) == [Row("0.1 0.1", " 1.50")]
