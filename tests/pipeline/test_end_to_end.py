"""Three methods over one tiny sequence on a real Ray cluster: what a user finds afterwards."""

import json
from itertools import pairwise
from statistics import fmean

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from agcl.importance import Importance
from agcl.tasks import EncodedRows, facts
from pipeline.config import loading
from pipeline.config.naming import method_description
from pipeline.storage import Local, artifact

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

LABELS = ["sequential", "gradient", "solo"]
TRAINED = ["train/1-harbour", "train/2-valley"]


def weights(folder):
    return load_file(folder / "model.safetensors")


def same_bits(first, second):
    one, two = weights(first), weights(second)
    assert one.keys() == two.keys()
    return all(torch.equal(one[k].view(torch.int32), two[k].view(torch.int32)) for k in one)


@pytest.mark.parametrize(("label", "first_is_protected"), [("gradient", False), ("solo", True)])
def test_a_protection_changes_the_first_model_only_if_it_protects_the_base(
    finished, label, first_is_protected
):
    for stage, same in zip(TRAINED, (not first_is_protected, False), strict=True):
        own, sequential = (finished.artifact(n, stage) for n in (label, "sequential"))
        assert same_bits(own, sequential) is same


def test_protections_freeze_what_has_no_importance(finished):
    stages = ["pretrain", *TRAINED]
    for before, after in pairwise(weights(finished.artifact("solo", stage)) for stage in stages):
        assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
        assert not torch.equal(
            before["model.layers.0.mlp.up_proj.weight"], after["model.layers.0.mlp.up_proj.weight"]
        )


def test_every_artifact_is_whole_and_nothing_else_is_left(finished):
    folders = {stage.folder for run in finished.runs.values() for stage in run.resolved.values()}
    others = {finished.storage / name for name in ("stages", "mlartifacts", "mlflow.db")}
    assert set(finished.left) == folders | others
    for folder in folders:
        artifact.verify(folder)


def test_what_methods_share_was_computed_once(finished):
    done = [line for line in finished.output.splitlines() if "done" in line]
    folders = {stage.folder for run in finished.runs.values() for stage in run.resolved.values()}
    assert len(done) == len(folders)
    assert f"({len(folders)}/{len(folders)})" in done[-1]


def test_prepared_rows_are_the_tasks_rows_in_order_and_tokenized(finished):
    folder = finished.artifact("sequential", "prepare/valley")
    tokenizer = AutoTokenizer.from_pretrained(finished.artifact("sequential", "tokenizer"))
    task = facts.task(1, entities=3, base_entities=8, seed=0)
    for split in ("train", "test"):
        rows = EncodedRows(folder / f"{split}.arrow")
        expected = list(task.splits[split]())
        assert rows.table["prompt"].to_pylist() == [row.prompt for row in expected]
        assert rows.table["answer"].to_pylist() == [row.answer for row in expected]
        for encoded, row in zip(rows, expected, strict=True):
            end = [tokenizer.eos_token_id]
            assert encoded.input_ids[: encoded.prompt_tokens] == tokenizer(row.prompt)["input_ids"]
            answer = encoded.input_ids[encoded.prompt_tokens :]
            assert answer == tokenizer(row.answer)["input_ids"] + end
    summary = json.loads((folder / "summary.json").read_text())
    assert {split: counts["rows"] for split, counts in summary["splits"].items()} == {
        "train": 12,
        "test": 12,
    }


def test_the_tiny_sequence_learns_and_forgets_something(finished):
    # Else the tests of this module would compare nothing with nothing.
    matrix = finished.metrics("sequential")["accuracy_matrix"]
    assert matrix[0][0] < 0.5
    assert matrix[1][0] > 0.7
    assert matrix[2][1] > 0.7
    assert 0 < matrix[2][0] < matrix[1][0]


@pytest.mark.parametrize("label", ["sequential", "solo"])
def test_the_final_model_answers_with_plain_transformers_as_the_metrics_say(finished, label):
    folder = finished.folder / label / "model"
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    shares = finished.metrics(label)["accuracy_matrix"][-1]
    for task, share in zip(("harbour", "valley"), shares, strict=True):
        rows = EncodedRows(finished.artifact(label, f"prepare/{task}") / "train.arrow")
        verdicts = []
        for row, answer in zip(rows, rows.table["answer"].to_pylist(), strict=True):
            prompt = row.input_ids[: row.prompt_tokens]
            out = model.generate(
                torch.tensor([prompt]), max_new_tokens=20, do_sample=False, pad_token_id=0
            )[0].tolist()
            verdicts.append(out[: len(row.input_ids)] == row.input_ids)
            if verdicts[-1]:
                assert tokenizer.decode(out[len(prompt) :], skip_special_tokens=True) == answer
        assert fmean(verdicts) == pytest.approx(share)


def test_importances_are_those_of_their_task_and_method(finished):
    solo, gradient = (
        Importance.load(finished.artifact(label, "attribute/1-harbour") / "importance.safetensors")
        for label in ("solo", "gradient")
    )
    header = {k: solo.header[k] for k in ("rules", "top_k", "rows", "moments")}
    assert header == {"rules": "attnlrp", "top_k": 4, "rows": 12, "moments": "relevance"}
    correct = finished.metrics("sequential")["accuracy_matrix"][1][0]
    assert solo.header["rows_attributed"] == round(12 * correct)
    assert solo.inputs.keys() == solo.entries.keys() == gradient.entries.keys()
    assert not gradient.moments
    # The first task's model is the same alone and in a sequence that does not protect the base.
    assert all(torch.equal(solo.entries[k], gradient.entries[k]) for k in solo.entries)
    assert not solo.is_zero()
    base = Importance.load(finished.artifact("solo", "attribute/0-base") / "importance.safetensors")
    header = {k: base.header[k] for k in ("rules", "rows", "rows_attributed", "moments")}
    assert header == {"rules": "attnlrp", "rows": 2, "rows_attributed": 2, "moments": "uniform"}
    assert base.inputs.keys() == base.entries.keys() == solo.entries.keys()


@pytest.mark.parametrize("label", LABELS)
def test_a_runs_folder_holds_config_report_and_a_link_to_every_stage(finished, label):
    folder = finished.folder / label
    assert loading.load(folder / "config.yaml") == finished.configs[label]
    assert "</html>" in (folder / "report.html").read_text(encoding="utf-8")
    assert "</html>" in (finished.folder / "report.html").read_text(encoding="utf-8")
    card = (folder / "model" / "README.md").read_text(encoding="utf-8")
    mlflow_run = card.split("MLflow run: `")[1].split("`")[0]
    assert mlflow_run in (folder / "mlflow.json").read_text(encoding="utf-8")
    for stage, found in finished.runs[label].resolved.items():
        assert (folder / stage.replace("/", "-")).resolve() == found.folder.resolve()
    files = [file for file in (folder / "model").iterdir() if file.name != "README.md"]
    assert files
    assert not any(file.is_symlink() for file in files)  # They can be moved and copied.


def test_ray_gives_what_plain_functions_in_one_process_give(finished, run_in_process, tmp_path):
    label = "solo"  # It has stages of every kind, and starts from what all labels share.
    config = finished.configs[label].model_copy(update={"storage": Local(tmp_path / "storage")})
    resolved = run_in_process(config)
    for stage in TRAINED:
        assert same_bits(resolved[stage].folder, finished.artifact(label, stage))
    metrics = json.loads((resolved["report"].folder / "metrics.json").read_text())
    scorers = dict.fromkeys(("harbour", "valley"), "exact_match")
    of_run = {"name": "tiny", "description": method_description(config), "scorers": scorers}
    assert {**metrics, **of_run} == finished.metrics(label)


def test_running_again_runs_no_stage_and_gives_the_same(finished, run_configs, undrawn):
    folders = sorted((finished.storage / "stages").iterdir())
    manifests = [artifact.read_manifest(folder) for folder in folders]
    before = {label: finished.metrics(label) for label in LABELS}
    _, results, output = run_configs(finished.configs, finished.folder)
    assert "every stage is complete already" in output
    assert "done" not in output
    assert sorted((finished.storage / "stages").iterdir()) == folders
    assert [artifact.read_manifest(folder) for folder in folders] == manifests
    assert {label: finished.metrics(label) for label in LABELS} == before
    assert all(stage.reused for result in results.values() for stage in result.stages)
    assert not any(s.reused for s in finished.results["sequential"].stages)


def test_a_loss_that_is_not_finite_ends_the_stage_and_leaves_nothing(
    tiny_config, run_in_process, tmp_path
):
    config = tiny_config(tmp_path / "storage", "training.learning_rate=1e30", method="sequential")
    with pytest.raises(ArithmeticError, match=r"at step \d+ of 24"):
        run_in_process(config)
    assert not list(config.storage.root.glob("stages/train-*"))


def test_a_damaged_artifact_is_named_and_not_built_upon(
    finished, tiny_config, run_in_process, copy_stages, tmp_path
):
    storage = tmp_path / "storage"
    copy_stages(finished.storage, storage, ("tokenizer", "prepare"))
    (rows,) = storage.glob("stages/prepare-valley-*/train.arrow")
    content = bytearray(rows.read_bytes())
    content[-1] ^= 1
    rows.write_bytes(content)
    config = tiny_config(storage, method="sequential")
    with pytest.raises(
        artifact.CorruptArtifact, match=r"prepare-valley-\w+ is corrupt: train\.arrow"
    ):
        run_in_process(config)
    assert not list(config.storage.root.glob("stages/train-*"))
