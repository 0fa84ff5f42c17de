"""The base model as task 0: what it is measured on, and that what it knew is kept."""

import json

import pytest
import torch
from reference import chat

from agcl.errors import InputError
from agcl.importance import Importance
from agcl.model import adapter, models
from agcl.tasks import EncodedRows
from pipeline.config.check_data import _has_text
from pipeline.config.sources import text_files
from pipeline.stages.base_knowledge import _text_ids
from pipeline.stages.base_text import pieces_of
from pipeline.stages.files import IMPORTANCE_FILE, PAST_FILE, TEXTS

FEW = (
    *("base.samples=2", "base.tokens=5", "training.epochs=2"),
    *("base.energy=1", "importance.keep=1"),
)
"""At most twelve input directions of 128: all of them can be protected, and others trained."""


def outputs(folder, ids):
    with torch.no_grad():
        return models.load_model(folder)(torch.tensor([ids])).logits


def on_own_texts(resolved, model):
    """The largest change of a model's logits on the base model's own texts."""
    rows = EncodedRows(resolved["own_text"].folder / "train.arrow")
    assert len(rows) == 2
    changes = []
    for i in range(len(rows)):
        ids = rows[i].input_ids[:-1]  # Its last token predicts nothing and is not measured.
        before = outputs(resolved["pretrain"].folder, ids)
        changes.append(float((outputs(resolved[model].folder, ids) - before).abs().max()))
    return max(changes)


def test_with_energy_1_the_model_answers_its_own_texts_as_before_while_it_learns(run):
    resolved = run(*FEW, "base.protect=self", "tasks.count=1")
    unprotected = run(*FEW, "base.protect=none", "tasks.count=1")
    assert on_own_texts(resolved, "train/1-harbour") < 0.01
    assert on_own_texts({**unprotected, "own_text": resolved["own_text"]}, "train/1-harbour") > 1


def test_later_tasks_leave_the_base_alone_too(run):
    assert on_own_texts(run(*FEW, "base.protect=self"), "train/2-valley") < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora_agcl", pytest.param("inflora", marks=pytest.mark.slow)])
def test_an_adapter_passes_nothing_of_the_base_models_inputs(run, method):
    resolved = run(*FEW, "base.protect=self", "protect.0.energy=0.5", method=method)
    for stage in ("train/1-harbour", "train/2-valley"):
        assert on_own_texts(resolved, stage) < 0.01
    assert (resolved["train/1-harbour"].folder / "adapter" / adapter.WEIGHTS).is_file()


def test_the_bases_tokens_are_weighted_by_relevance_if_asked(run):
    few, found = ("base.samples=2", "base.tokens=5", "tasks.count=1", "training.epochs=1"), {}
    for weighting in ("uniform", "relevance"):
        resolved = run(*few, "base.protect=self", f"base.weighting={weighting}")
        importance = Importance.load(resolved["attribute/0-base"].folder / IMPORTANCE_FILE)
        assert importance.header["moments"] == weighting
        found[weighting] = importance.moments["model.layers.0.self_attn.q_proj.weight"]
    uniform, relevance = found["uniform"], found["relevance"]
    assert relevance.trace == pytest.approx(uniform.trace, rel=1e-4)  # Weights have a mean of 1.
    assert (relevance.matrix() - uniform.matrix()).norm() > 0.1 * uniform.matrix().norm()


def test_own_texts_can_be_read_and_are_what_was_measured(run):
    resolved = run(*FEW, "base.protect=self", "tasks.count=1")
    lines = (resolved["own_text"].folder / TEXTS).read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line) for line in lines]
    rows = EncodedRows(resolved["own_text"].folder / "train.arrow")
    tokenizer = models.load_tokenizer(resolved["pretrain"].folder)
    assert [t["prompt"] + t["text"] for t in texts] == [
        tokenizer.decode(rows[i].input_ids) for i in range(2)
    ]
    importance = Importance.load(resolved["attribute/0-base"].folder / IMPORTANCE_FILE)
    assert importance.header["rows"] == 2
    moment = importance.moments["model.layers.0.self_attn.q_proj.weight"]
    # Unit inputs, equal weights: the trace is the number of tokens that predict one.
    assert moment.trace == pytest.approx(2 * 5, rel=1e-5)


def test_a_gate_and_a_penalty_protect_the_base_in_the_first_task(run):
    """The weights that the model's own text relied on move less than without."""
    few = ("base.samples=4", "base.tokens=12", "tasks.count=1", "training.epochs=2")
    for method, strong in (("gate", "protect.0.strength=1"), ("ewc", "protect.0.strength=1e7")):
        moved = {}
        for protect in ("self", "none"):
            resolved = run(*few, strong, f"base.protect={protect}", method=method)
            before = models.load_model(resolved["pretrain"].folder).state_dict()
            after = models.load_model(resolved["train/1-harbour"].folder).state_dict()
            moved[protect] = {name: (after[name] - before[name]).abs() for name in before}
        entries = importance_of(run, few, strong, method).entries
        for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.3.mlp.down_proj.weight"):
            top = entries[name].flatten().float().topk(100).indices
            ratio = (
                moved["self"][name].flatten()[top].sum() / moved["none"][name].flatten()[top].sum()
            )
            assert ratio < 0.7, (method, name)


def importance_of(run, few, strong, method):
    resolved = run(*few, strong, "base.protect=self", method=method)
    return Importance.load(resolved["attribute/0-base"].folder / IMPORTANCE_FILE)


def test_the_builtin_models_rows_are_its_generic_facts(run):
    resolved = run("base.protect=rows", "tasks.count=1", "base.samples=1000", "training.epochs=1")
    importance = Importance.load(resolved["attribute/0-base"].folder / IMPORTANCE_FILE)
    assert importance.header["rows"] == importance.header["rows_attributed"] == 64


def test_rows_of_any_format_protect_the_base(run, tmp_path):
    row = {"prompt": "Where?", "answer": " Here."}
    (tmp_path / "known.jsonl").write_text("\n".join([json.dumps(row)] * 3) + "\n")
    rows = (
        f"base.rows={{format: jsonl, sequence: [{{name: harbour, train: {tmp_path}/known.jsonl}}]}}"
    )
    resolved = run(
        *("base.protect=rows", rows, "base.samples=9", "tasks.count=1", "training.epochs=1")
    )
    assert resolved["prepare/base/harbour"].folder != resolved["prepare/harbour"].folder
    importance = Importance.load(resolved["attribute/0-base"].folder / IMPORTANCE_FILE)
    assert importance.header["rows"] == 3


def test_energy_zero_of_the_base_protects_the_tasks_alone_bit_for_bit(run):
    resolved = run("base.energy=0", "training.epochs=2")
    unprotected = run("training.epochs=2", method="base_unprotected")
    for stage in ("train/1-harbour", "train/2-valley"):
        assert resolved[stage].folder != unprotected[stage].folder
        found, expected = (
            models.load_model(each[stage].folder).state_dict() for each in (resolved, unprotected)
        )
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_text_is_cut_at_words_over_all_files(tmp_path, run):
    (tmp_path / "a.txt").write_text(" ".join(f"alpha{i}é" for i in range(300)), encoding="utf-8")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c.md").write_text(" ".join(f"beta{i}" for i in range(300)), encoding="utf-8")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("hidden " * 1000, encoding="utf-8")
    assert [file.name for file in text_files(tmp_path)] == ["a.txt", "c.md"]
    pieces = list(pieces_of(tmp_path, samples=20, size=100, seed=0))
    assert pieces == list(pieces_of(tmp_path, samples=20, size=100, seed=0))
    assert pieces != list(pieces_of(tmp_path, samples=20, size=100, seed=1))
    assert len(set(pieces)) == 20
    assert 5 < sum("alpha" in piece for piece in pieces) < 15
    for piece in pieces:
        assert piece.startswith(("alpha", "beta"))
        assert len(piece.encode()) > 60
    resolved = run(
        "base.protect=text",
        f"base.text={tmp_path}",
        "base.samples=6",
        "tasks.count=1",
        "base.tokens=9",
        "training.epochs=1",
    )
    rows = EncodedRows(resolved["base_text"].folder / "train.arrow")
    assert [len(rows[i].input_ids) for i in range(len(rows))] == [10] * 6


def test_a_short_text_gives_fewer_pieces(tmp_path):
    (tmp_path / "a.txt").write_text("one two three", encoding="utf-8")
    assert list(pieces_of(tmp_path / "a.txt", samples=9, size=100, seed=0)) == ["one two three"]


def test_byte_order_marks_and_line_ends_of_windows_are_no_text(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert list(pieces_of(file, samples=1, size=100, seed=0)) == ["one\ntwo\n"]
    tokenizer = chat.tokenizer()
    expected = tokenizer("one\ntwo\n", add_special_tokens=False)["input_ids"]
    assert _text_ids(tokenizer, file, 100) == expected
    file.write_bytes(b"\xef\xbb\xbf\r\n")
    assert not _has_text(file, "evaluation.text")


def test_white_space_in_places_gives_fewer_pieces(tmp_path):
    (tmp_path / "a.txt").write_text("one two " + " " * 1000 + "three four", encoding="utf-8")
    pieces = list(pieces_of(tmp_path / "a.txt", samples=10, size=100, seed=0))
    assert 1 <= len(pieces) <= 3
    assert all(piece.strip() for piece in pieces)


def test_an_empty_folder_is_refused(tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(InputError, match=f"no text in {tmp_path}"):
        text_files(tmp_path)


def test_a_later_task_reads_one_file_with_the_moments_of_all_earlier_ones(run):
    """The running sum: of three tasks it holds what the three artifacts hold together."""
    few = ("training.epochs=1", "training.learning_rate=1e-4", "importance.correct_only=false")
    resolved = run("base.protect=none", "tasks.count=3", "importance.keep=1", *few)
    folders = [w.folder for name, w in resolved.items() if name.startswith("attribute/")][:3]
    assert not (folders[0] / PAST_FILE).exists()
    parts = [Importance.load(folder / IMPORTANCE_FILE) for folder in folders]
    total = Importance.load(folders[2] / PAST_FILE)
    assert total.header["tasks"] == 3
    assert total.inputs == parts[0].inputs
    for name, moment in total.moments.items():
        expected = sum(part.moments[name].matrix() for part in parts)
        scale = float(expected.diagonal().max())
        torch.testing.assert_close(moment.matrix(), expected, rtol=0, atol=2e-3 * scale)
        # The trace is that of the energies, in which sums of float16 directions round.
        traces = sum(part.moments[name].trace for part in parts)
        assert moment.trace == pytest.approx(traces, rel=1e-4)
