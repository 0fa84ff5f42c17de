"""Tasks from Hugging Face datasets in local folders."""

import gzip
import os
import pickle
import re
import zipfile

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from agcl.errors import InputError
from agcl.tasks import TEST, TRAIN, Row, check_rows, huggingface

FEATURES = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
ROWS = {"text": ["dull", "fine", "fun"], "label": [0, 1, 1]}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Use a cache per test, and nothing in the home folder."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def task(path, *, train="train", test="test", prompt="{text}?", answer=" {label}", subset=None):
    splits = {TRAIN: train, **({TEST: test} if test else {})}
    return huggingface.task(
        "films", str(path), splits, subset=subset, revision=None, prompt=prompt, answer=answer
    )


def saved(folder, rows=ROWS, features=FEATURES):
    data = Dataset.from_dict(rows, features=features)
    DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(folder)
    return folder


def test_labels_are_replaced_by_their_names(tmp_path):
    found = task(saved(tmp_path / "films"))
    expected = [Row("dull?", " bad"), Row("fine?", " good"), Row("fun?", " good")]
    assert list(found.splits[TRAIN]()) == expected
    assert list(found.splits[TEST]()) == expected[:1]
    assert list(pickle.loads(pickle.dumps(found)).splits[TRAIN]()) == expected


def test_a_folder_of_data_files_is_loaded(tmp_path):
    (tmp_path / "films").mkdir()
    (tmp_path / "films" / "train.csv").write_text("text,label\ndull,bad\nfine,good\n")
    found = task(tmp_path / "films", test=None)
    assert list(found.splits[TRAIN]()) == [Row("dull?", " bad"), Row("fine?", " good")]
    assert found.memorized
    part = task(tmp_path / "films", train="train[1:]", test=None)
    assert list(part.splits[TRAIN]()) == [Row("fine?", " good")]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"train": "dev"}, "dev"),
        ({"prompt": "{question}"}, r"train row 1: no column 'question' .columns: text, label"),
    ],
)
def test_a_missing_split_or_column_is_named(tmp_path, options, reason):
    with pytest.raises(InputError, match=rf"films.*{reason}"):
        check_rows(task(saved(tmp_path / "films"), **options), TRAIN)


def test_a_row_without_a_label_is_named(tmp_path):
    folder = saved(tmp_path / "films", {"text": ["a", "b"], "label": [1, -1]})
    with pytest.raises(InputError, match=r"train row 2: 'label' is null"):
        check_rows(task(folder), TRAIN)


@pytest.mark.parametrize("content", ["{", '{"text": ', "\0\1\2"])
def test_broken_data_files_are_named(tmp_path, content):
    (tmp_path / "films").mkdir()
    (tmp_path / "films" / "train.jsonl").write_text(content)
    with pytest.raises(InputError, match="films"):
        check_rows(task(tmp_path / "films", test=None), TRAIN)


def rows(path, split=TRAIN, **options):
    return list(task(path, **options).splits[split]())


def test_a_file_whose_content_changed_is_read_anew(tmp_path):
    """The cache of `datasets` goes by path, size and time."""
    file = tmp_path / "films" / "train.csv"
    file.parent.mkdir()
    for label in ("bad", "top"):
        file.write_text(f"text,label\ndull,{label}\n")
        os.utime(file, (1_700_000_000, 1_700_000_000))
        assert rows(file.parent, test=None) == [Row("dull?", f" {label}")]


@pytest.mark.parametrize("value", ["007", "2.50", "None", "NA", "null", "nan", "1e-05", "True"])
def test_the_columns_of_csv_are_text(tmp_path, value):
    (tmp_path / "train.csv").write_text(f"text,label\n1,{value}\n2,2.5\n")
    assert rows(tmp_path, test=None)[0] == Row("1?", f" {value}")


@pytest.mark.parametrize("literal", ["0.00001", "1.50", "true", '"2024-01-01"', '"NaN"'])
@pytest.mark.parametrize("name", ["train.jsonl", "train.json", "train.jsonl.gz"])
def test_json_in_a_folder_is_rendered_as_written(tmp_path, name, literal):
    lines = f'{{"text": 1, "label": {literal}}}\n'.encode() * 2
    (tmp_path / name).write_bytes(gzip.compress(lines) if name.endswith("gz") else lines)
    expected = Row("1?", " " + literal.strip('"'))
    assert rows(tmp_path, test=None) == [expected] * 2


@pytest.mark.parametrize("value", ["007", "None"])
def test_tables_may_have_tabs_and_be_compressed(tmp_path, value):
    for name in ("train.tsv", "test.tsv.gz"):
        table = f"text\tlabel\n1, 2\t{value}\n".encode()
        (tmp_path / name).write_bytes(gzip.compress(table) if name.endswith("gz") else table)
    assert rows(tmp_path) == rows(tmp_path, TEST) == [Row("1, 2?", f" {value}")]


def test_rows_in_an_archive_are_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "train.zip", "w") as archive:
        archive.writestr("a.jsonl", '{"text": "a", "label": "b"}\n')
        archive.writestr("b.jsonl", '{"text": "c", "label": "d"}\n')
    assert rows(tmp_path, test=None) == [Row("a?", " b"), Row("c?", " d")]


@pytest.mark.parametrize("content", ["a,b\n1,2\n1,2,3\n", "", "a,b\n\udcff,1\n"])
def test_broken_csv_is_named(tmp_path, content):
    (tmp_path / "train.csv").write_text(content, errors="surrogateescape")
    with pytest.raises(InputError, match=r"/train\.csv: "):
        rows(tmp_path, test=None)


def test_types_that_a_folder_declares_are_kept(tmp_path):
    (tmp_path / "train.csv").write_text("text,label\n007,1\n")
    names = "{class_label: {names: {'0': bad, '1': good}}}"
    features = f"[{{name: text, dtype: int64}}, {{name: label, dtype: {names}}}]"
    (tmp_path / "README.md").write_text(f"---\ndataset_info: {{features: {features}}}\n---\n")
    assert rows(tmp_path, test=None) == [Row("7?", " good")]


LETTERS = Dataset.from_dict({"text": list("abcdefgh"), "label": list("ABCDEFGH")})


@pytest.mark.parametrize("kind", ["saved", "files"])
@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", "abcdefgh"),
        ("train[:2]", "ab"),
        ("train[6:]", "gh"),
        ("train[-1:]", "h"),
        ("train[:25%]+train[7:]", "abh"),
        ("all", "abcdefgh"),
    ],
)
def test_slices_are_taken_wherever_the_rows_come_from(tmp_path, kind, split, expected):
    if kind == "saved":
        LETTERS.save_to_disk(tmp_path / "letters")
    else:
        (tmp_path / "letters").mkdir()
        LETTERS.to_json(tmp_path / "letters" / "train.jsonl")
    found = rows(tmp_path / "letters", train=split, test=None)
    assert "".join(row.prompt[0] for row in found) == expected


@pytest.mark.parametrize("split", ["trian", "test", "train[:2", "train[x:]"])
def test_a_split_that_is_not_there_is_refused(tmp_path, split):
    LETTERS.save_to_disk(tmp_path / "letters")
    with pytest.raises(InputError, match=rf"letters, {re.escape(split)}: ") as error:
        rows(tmp_path / "letters", TEST, test=split)
    assert ("test: null scores the training rows" in str(error.value)) == (split == "test")


def test_a_file_is_refused_and_what_reads_it_is_said(tmp_path):
    (tmp_path / "films.jsonl").touch()
    with pytest.raises(InputError, match=r"films\.jsonl: a file; .*folder.*formats jsonl"):
        task(tmp_path / "films.jsonl")


def test_small_floats_are_rendered_in_their_own_precision(tmp_path):
    features = Features({"text": Value("float32"), "label": Value("string")})
    data = Dataset.from_dict({"text": [0.1], "label": ["x"]}, features=features)
    data.save_to_disk(tmp_path / "saved")
    (tmp_path / "files").mkdir()
    data.to_parquet(tmp_path / "files" / "train.parquet")
    for folder in ("saved", "files"):
        assert rows(tmp_path / folder, test=None) == [Row("0.1?", " x")]


def test_an_empty_folder_and_an_unknown_name_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "films").mkdir()
    for path in (tmp_path / "films", "nobody/no-such-data-set-here", "a b c"):
        with pytest.raises(InputError, match=str(path)):
            check_rows(task(path), TRAIN)
