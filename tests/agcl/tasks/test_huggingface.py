"""Tasks from Hugging Face datasets in local folders."""

import pickle

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


def test_an_empty_folder_and_an_unknown_name_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "films").mkdir()
    for path in (tmp_path / "films", "nobody/no-such-data-set-here", "a b c"):
        with pytest.raises(InputError, match=str(path)):
            check_rows(task(path), TRAIN)
