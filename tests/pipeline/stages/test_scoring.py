"""Evaluate, attribute and report on tasks whose scorers need the model's own text."""

import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from reference import chat

from agcl.importance import Importance
from agcl.model import models
from agcl.model.builtin import builtin_model, builtin_tokenizer
from agcl.scoring.scorers import SCORERS
from agcl.tasks import EncodedRows, Row, encode, messages
from agcl.train import train_task
from pipeline.stages.attribute import attribute
from pipeline.stages.context import Context
from pipeline.stages.evaluate import _scored, evaluate
from pipeline.stages.metrics import report

LEARNED = [
    Row(f"What is {i}?", answer)
    for i, answer in enumerate([" a Red house", " blue, blue sea", " an old dog", " green tea"])
]
ASKED = [
    LEARNED[0],  # right
    Row(LEARNED[1].prompt, " Blue blue sea!"),  # right but for case and punctuation
    Row(LEARNED[2].prompt, " an old cat"),  # two words of three
    Row(LEARNED[3].prompt, " something else, much longer than that"),
]
SETTINGS = {
    "batch_size": 3,
    "precision": "float32",
    "scorers": [],
    "task_scorers": [("one", "exact_match")],
    "max_new_tokens": None,
    "validation": None,
    "chat_template": False,
    "saved": False,
    "new": [],
    "facts": None,
    "loading": {"dtype": "float32"},
}

ATTRIBUTION = {
    "estimator": "lrp",
    "rules": "attnlrp",
    "top_k": 1,
    "running_values": "float32",
    "permuted": False,
    "precision": "float32",
    "keep": 0.95,
    "entries": True,
    "split": "samples",
    "samples": None,
    "correct_only": True,
    "batch_size": 2,
    "moments": None,
    "unit_inputs": True,
    "seed": 0,
    "loading": {"dtype": "float32"},
}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A tiny model that has learned four answers."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = builtin_tokenizer(row.prompt + row.answer for row in [*LEARNED, *ASKED])
    model = builtin_model(len(tokenizer), seed=0)
    write_rows(folder, tokenizer, {"train": LEARNED})
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    options = {"epochs": 60, "batch_size": 4, "micro_batch_size": 4, "seed": 0}
    train_task(model, EncodedRows(folder / "train.arrow"), optimizer, **options)
    models.save(model, tokenizer, folder)
    return folder


def write_rows(folder, tokenizer, splits, **summary):
    folder.mkdir(exist_ok=True)
    for split, rows in splits.items():
        table = encode(tokenizer, rows)
        with (
            pa.OSFile(str(folder / f"{split}.arrow"), "wb") as sink,
            pa.ipc.new_file(sink, table.schema) as writer,
        ):
            writer.write_table(table)
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture
def scored(tmp_path, model_folder):
    """Evaluates the model on a task of two splits; scores, predictions by set, and the folder."""

    def run(scorer, *, sets=(("test", "test"),), asked=ASKED, **changes):
        tokenizer = models.load_tokenizer(model_folder)
        splits = {"train": LEARNED, "test": asked, "validation": LEARNED[:2]}
        rows = write_rows(tmp_path / "rows", tokenizer, splits, scored=dict(sets))
        out = tmp_path / "out"
        out.mkdir(exist_ok=True)
        inputs = {"model": model_folder, "rows/one": rows}
        settings = {**SETTINGS, "task_scorers": [("one", scorer)], **changes}
        evaluate(settings, inputs, out, Context())
        table = pq.read_table(out / "predictions.parquet").to_pylist()
        by_set = {}
        for row in table:
            by_set.setdefault(row["evaluation_set"], []).append(row)
        return json.loads((out / "scores.json").read_text())["one"], by_set, out

    return run


def test_the_best_of_several_references_counts(scored):
    others = [(), (" red",), (" one", " an old dog"), (" tea",)]
    asked = [replace(row, references=o) for row, o in zip(ASKED, others, strict=True)]
    scores, rows, _ = scored("rouge_l", asked=asked, scorers=["exact_match", "token_f1"])
    # "green tea" against "tea": precision 1/2, recall 1.
    assert [row["score"] for row in rows["test"]] == pytest.approx([1, 1, 1, 2 / 3])
    assert [row["references"] or [] for row in rows["test"]] == [list(o) for o in others]
    assert [row["score"] for row in rows["test-token_f1"]] == pytest.approx([1, 1, 1, 2 / 3])
    assert [row["score"] for row in rows["test-exact_match"]] == [1, 0, 0, 0]
    alone, _, _ = scored("rouge_l")
    assert scores["test"] == pytest.approx(alone["test"] + (1 / 3 + 2 / 3) / 4)


@pytest.mark.parametrize(
    ("scorer", "expected"),
    [
        ("exact_match", [1, 0, 0, 0]),
        ("normalised_exact_match", [1, 1, 0, 0]),
        ("olora_match", [1, 1, 0, 0]),
        ("token_f1", [1, 1, 0.5, 0]),
        ("rouge_l", [1, 1, 2 / 3, 0]),
    ],
)
def test_every_row_is_scored_by_the_tasks_scorer(scored, scorer, expected):
    scores, rows, _ = scored(scorer)
    assert [row["score"] for row in rows["test"]] == pytest.approx(expected)
    assert scores == {"test": pytest.approx(sum(expected) / 4)}
    assert {row["scorer"] for row in rows["test"]} == {scorer}
    if scorer != "exact_match":
        assert [row["predicted"] for row in rows["test"]] == [row.answer for row in LEARNED]


@pytest.mark.parametrize("scorer", [name for name in SCORERS if name != "sari"])
def test_a_perfect_answer_scores_1_whatever_special_tokens_the_reference_has(scored, scorer):
    ending = [Row(row.prompt, f"{row.answer}<end>") for row in LEARNED]
    assert scored(scorer, asked=ending)[0] == {"test": 1.0}


@pytest.mark.parametrize(
    "scorer",
    [
        "exact_match",
        *(pytest.param(s, marks=pytest.mark.slow) for s in ("normalised_exact_match", "token_f1")),
    ],
)
def test_labels_that_are_special_tokens_are_told_apart(tmp_path, scorer):
    learned = [Row("Good?", "<yes>"), Row("Bad?", "<no>")]
    tokenizer = builtin_tokenizer(row.prompt for row in learned)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<yes>", "<no>"]})
    model = builtin_model(len(tokenizer), seed=0)
    rows = write_rows(
        tmp_path, tokenizer, {"train": learned, "test": [*learned, Row("Bad?", "<yes>")]}
    )
    (rows / "summary.json").write_text(json.dumps({"scored": {"test": "test"}}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    options = {"epochs": 60, "batch_size": 2, "micro_batch_size": 2, "seed": 0}
    train_task(model, EncodedRows(rows / "train.arrow"), optimizer, **options)
    models.save(model, tokenizer, tmp_path)
    settings = {**SETTINGS, "task_scorers": [("one", scorer)]}
    evaluate(settings, {"model": tmp_path, "rows/one": rows}, tmp_path, Context())
    predictions = pq.read_table(tmp_path / "predictions.parquet").to_pylist()
    assert [row["score"] for row in predictions] == [1, 1, 0]
    assert [row["predicted"] for row in predictions] == ["<yes>", "<no>", "<no>"]


def test_decoding_stops_at_the_longest_answer_or_where_it_is_told_to(scored):
    _, rows, _ = scored("rouge_l", max_new_tokens=2)
    assert all(len(row["predicted"].split()) <= 2 for row in rows["test"][1:])


def test_with_exact_match_alone_a_wrong_answer_is_the_models_own_up_to_its_first_wrong_token(
    scored,
):
    said, own = (
        [row["predicted"] for row in scored(s)[1]["test"]] for s in ("exact_match", "rouge_l")
    )
    assert said != own
    assert said[0] == own[0]
    assert all(answer.startswith(text) for text, answer in zip(said, own, strict=True))


def test_more_scorers_are_evaluation_sets_of_their_own(scored):
    scores, rows, _ = scored("exact_match", scorers=["token_f1", "agcl.scoring.scorers:rouge_l"])
    assert list(scores) == list(rows) == ["test", "test-token_f1", "test-rouge_l"]
    assert scores["test"] == 0.25
    assert scores["test-token_f1"] == pytest.approx(2.5 / 4)


def test_a_scorer_gets_the_question_and_not_what_a_chat_template_makes_of_it():
    """As SARI needs it: the template's words are no part of what is simplified."""
    tokenizer = chat.tokenizer()
    talk = messages.row_of(chat.MESSAGES, None, "")
    rows = encode(tokenizer, [Row("Who? Me!", " Me!"), talk], chat=True)
    assert "<|im_start|>" in rows["prompt"][0].as_py()
    assert rows["question"].to_pylist() == ["Who? Me!", "And Žofie 🦔?"]
    sari = SCORERS["sari"]("Me?", "Me!", "Who? Me!")
    assert _scored("sari", ["Me?", ""], ["Me!", "?"], rows, [False] * 2)[0] == sari
    plain = encode(tokenizer, [Row("Who? Me!", "Me!")])
    assert _scored("sari", ["Me?"], ["Me!"], plain, [False]) == [sari]


def test_a_score_that_is_none_is_refused_with_scorer_and_row(scored, monkeypatch):
    monkeypatch.setattr("agcl.scoring.scorers.rouge_l", lambda prediction, reference: float("nan"))
    with pytest.raises(ValueError, match=r"agcl\.scoring\.scorers:rouge_l gives nan for row 0"):
        scored("agcl.scoring.scorers:rouge_l")


def test_validation_rows_of_the_task_are_chosen_by_and_never_reported(scored, tmp_path):
    sets = [("test", "test"), ("validation", "validation")]
    _, _, folder = scored("exact_match", sets=sets, scorers=["rouge_l"])
    out = tmp_path / "report"
    out.mkdir()
    config = {
        "method": "sequential",
        "seed": 0,
        "tasks": ["one"],
        "facts": None,
        "evaluation_set": None,
        "validation": 0.1,
        "only_validation": False,
    }
    report(config, {"scores/0": folder, "scores/1": folder}, out, Context())
    metrics = json.loads((out / "metrics.json").read_text())
    assert list(metrics["evaluation_sets"]) == ["test", "test-rouge_l"]
    assert metrics["average_performance"] == 0.25
    assert {name: each["average_performance"] for name, each in metrics["validation"].items()} == {
        "validation": 1.0,
        "validation-rouge_l": 1.0,
    }


def test_tasks_without_a_common_evaluation_set_are_named(tmp_path, model_folder):
    """One is tested on its training rows, a share of which chooses settings; one has others."""
    tokenizer = models.load_tokenizer(model_folder)
    inputs = {"model": model_folder}
    for task, name in (("base", "test"), ("two", "validation")):
        scored, splits = {name: "train"}, {"train": LEARNED}
        inputs[f"rows/{task}"] = write_rows(tmp_path / task, tokenizer, splits, scored=scored)
    scorers = [("base", "exact_match"), ("two", "exact_match")]
    settings = {**SETTINGS, "task_scorers": scorers, "validation": 0.9}
    with pytest.raises(
        ValueError, match="no evaluation set in common \\(base has test; two has val"
    ):
        evaluate(settings, inputs, tmp_path, Context())


def test_no_fact_is_both_a_validation_and_a_test_row(tmp_path, model_folder):
    """A fact has two questions here, the trained one and a paraphrase."""
    tokenizer = models.load_tokenizer(model_folder)
    asked = {
        "train": [Row(f"What is {i}?", " x", fact=f"{i}") for i in range(40)],
        "test": [Row(f"Which one is {i}?", " x", fact=f"{i}") for i in range(40)],
    }
    sets = {"memorization": "train", "generalization": "test"}
    rows = write_rows(tmp_path / "rows", tokenizer, asked, scored=sets)
    found = {}
    for share in (None, 0.3):
        out = tmp_path / str(share)
        out.mkdir()
        inputs = {"model": model_folder, "rows/one": rows}
        evaluate({**SETTINGS, "validation": share}, inputs, out, Context())
        table = pq.read_table(out / "predictions.parquet").to_pylist()
        found[share] = [(row["evaluation_set"], row["prompt"].split()[-1]) for row in table]
    assert len(found[None]) == 80
    held = {fact for _, fact in found[0.3]}
    assert 5 < len(held) < 20
    assert sorted(found[0.3]) == sorted((name, fact) for name in sets for fact in held)
    # The report, which has the predictions only, decides the same.
    predictions = pq.read_table(tmp_path / "None" / "predictions.parquet")
    marked = pa.array([float(p.split()[-1] in held) for p in predictions["prompt"].to_pylist()])
    place = predictions.schema.get_field_index("score")
    pq.write_table(
        predictions.set_column(place, "score", marked), tmp_path / "None" / "predictions.parquet"
    )
    config = {
        "method": "sequential",
        "seed": 0,
        "tasks": ["one"],
        "facts": None,
        "evaluation_set": None,
        "validation": 0.3,
        "only_validation": False,
    }
    folders = {f"scores/{i}": tmp_path / "None" for i in range(2)}
    report(config, folders, tmp_path, Context())
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    for name in sets:
        assert metrics["evaluation_sets"][name]["average_performance"] == 0
        assert metrics["validation"][name]["average_performance"] == 1


@pytest.mark.parametrize(("correct_only", "rows"), [(True, 1), (False, 4)])
def test_only_right_answers_are_attributed_or_all(tmp_path, model_folder, correct_only, rows):
    tokenizer = models.load_tokenizer(model_folder)
    folder = write_rows(tmp_path / "rows", tokenizer, {"train": ASKED})
    settings = {**ATTRIBUTION, "correct_only": correct_only}
    attribute(settings, {"model": model_folder, "rows": folder}, tmp_path, Context())
    header = Importance.load(tmp_path / "importance.safetensors").header
    assert (header["rows"], header["rows_attributed"]) == (4, rows)
