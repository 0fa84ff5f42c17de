"""What MLflow holds when processes are killed, or two start at the same time, and of models."""

import json
import os
import shutil
from pathlib import Path

import mlflow
import pytest
import torch
from peft import AutoPeftModelForCausalLM
from reference import sums
from reference.variants import slow
from transformers import AutoModelForCausalLM, AutoTokenizer

from agcl.errors import InputError
from agcl.model import adapter, models
from pipeline.storage.artifact import write_json
from pipeline.tracking import client
from pipeline.tracking import tracker as tracking
from pipeline.tracking.registry import Scored, register


@pytest.mark.parametrize("written", [*slow(0), 1])
def test_a_run_whose_process_was_killed_while_making_it_is_made_once(
    raced, tmp_path, monkeypatch, written
):
    """Killed before the run's file is written the first time, or the second."""
    shutil.copy(raced.file, tmp_path)
    tracker = tracking.Tracker(tmp_path, None)
    calls = []

    def killed(file, value):
        if len(calls) == written:
            raise KeyboardInterrupt
        calls.append(value)
        write_json(file, value)

    monkeypatch.setattr(tracking, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        tracker.open(tmp_path, "tiny", {"kind": "sequence"})
    monkeypatch.undo()
    first = tracker.open(tmp_path, "tiny", {"kind": "sequence"})
    tracker.end(first, "KILLED")
    assert tracker.open(tmp_path, "tiny", {"kind": "sequence"}) == first
    (found,) = tracker.client.search_runs([tracker.experiment])
    assert (found.info.run_id, found.info.status) == (first, "RUNNING")


def test_two_runs_make_one_database_where_a_third_was_killed_while_making_it(raced):
    assert raced.codes == (0, 0)
    assert raced.files == [raced.file]


def test_a_run_of_other_data_is_not_reopened(raced, tmp_path):
    """Its params are the same: they name files, not what is in them."""
    shutil.copy(raced.file, tmp_path)
    tracker, params = tracking.Tracker(tmp_path, None), {"tasks": {"train": "/data/products.jsonl"}}

    def opened(**tags):
        run = tracker.open(tmp_path, "tiny", {"kind": "sequence", **tags}, None, params)
        tracker.params(run, params)
        return run

    untagged = opened()
    assert opened(fingerprint="f00d") == untagged  # Of an earlier version of agcl.
    assert opened(fingerprint="f00d") == untagged
    other = opened(fingerprint="beef")
    assert other != untagged
    assert opened(fingerprint="beef") == other
    assert tracker.client.get_run(untagged).info.status == "KILLED"  # It never ended by itself.


@pytest.mark.slow
def test_a_locked_database_is_as_good_as_a_server_that_is_down(monkeypatch, tmp_path):
    def locked(*args, **options):
        raise RuntimeError("(sqlite3.OperationalError) database is locked [SQL: SELECT 1]")

    found = client.Client(f"sqlite:///{tmp_path / 'mlflow.db'}")
    with pytest.raises(client.TrackingFailed, match="keeps its database locked") as caught:
        found._guarded(locked)()
    assert caught.value.no_answer


TASKS = [
    Scored("1-one", 1, {"test/one": 0.5, "test/two": 0.0}, 1000.0, "/stages/one"),
    Scored("2-two", 2, {"test/one": 0.25, "test/two": 0.75}, 2000.0, "/stages/two"),
]


@pytest.fixture
def tracker(raced, tmp_path):
    """A new database, which MLflow's own functions do not know."""
    shutil.copy(raced.file, tmp_path)
    return tracking.Tracker(tmp_path, None)


@pytest.fixture
def base(tmp_path):
    return sums.base_folder(tmp_path / "base", "LlamaForCausalLM", torch.bfloat16)


@pytest.fixture
def full(tmp_path):
    """A final folder with several weight files."""
    folder = tmp_path / "model"
    model = sums.model("LlamaForCausalLM", initializer_range=1.0)
    models.save(model, sums.tokenizer(), folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="50KB")
    (folder / "README.md").write_text("---\ntags: [agcl]\n---\n# card\n")
    return folder


@pytest.fixture
def alone(tmp_path, base):
    """A final folder with an adapter that changes the answers."""
    folder = tmp_path / "model"
    peft_model = adapter.attach(models.load_model(base), rank=4, alpha=8.0, seed=0)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1.0)
    adapter.save(peft_model, folder, base)
    sums.tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text("---\ntags: [agcl]\n---\n# card\n")
    return folder


def answer(model, tokenizer):
    ids = tokenizer(sums.QUESTIONS[0], return_tensors="pt")["input_ids"]
    out = model.generate(ids, do_sample=False, max_new_tokens=12)[0, ids.shape[1] :]
    return tokenizer.decode(out, skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["full", *slow("alone")])
def test_mlflow_opens_and_serves_the_registered_model(tracker, base, request, kind, monkeypatch):
    folder = request.getfixturevalue(kind)
    run = tracker.start("one", {}, None)
    register(tracker, run, "sums", folder, base, TASKS)
    opens = AutoModelForCausalLM if kind == "full" else AutoPeftModelForCausalLM
    expected = answer(opens.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracker.uri)
    pipe = mlflow.transformers.load_model("models:/sums/1")
    assert answer(pipe.model, pipe.tokenizer) == expected
    served = mlflow.pyfunc.load_model("models:/sums/1")
    (said,) = served.predict([sums.QUESTIONS[0]], params={"max_new_tokens": 12})
    assert said.strip() == expected.strip()
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert expected != answer(plain, AutoTokenizer.from_pretrained(folder))


def test_every_task_has_a_model_with_its_scores_and_the_last_one_is_registered(tracker, base, full):
    runs = [tracker.start(name, {}, None) for name in ("one", "two")]
    for run in (*runs, *runs):
        register(tracker, run, "sums", full, base, TASKS)
    versions = tracker.client.search_model_versions("name = 'sums'")
    assert sorted(int(version.version) for version in versions) == [1, 2]
    found = tracker.client.search_logged_models([tracker.experiment])
    assert sorted(model.name for model in found) == ["1-one", "1-one", "2-two", "2-two"]
    for model in found:
        task = next(task for task in TASKS if task.name == model.name)
        assert model.status == "READY"
        assert model.tags["artifact"] == task.place
        assert {m.key: (m.value, m.step) for m in model.metrics} == {
            key: (value, task.step) for key, value in task.scores.items()
        }
    outputs = tracker.client.get_run(runs[0]).outputs.model_outputs
    assert sorted(each.step for each in outputs) == [1, 2]
    last = {model.artifact_location for model in found if model.name == "2-two"}
    assert {version.source for version in versions} == last


def test_a_run_is_registered_once_under_each_name(tracker, base, full):
    run = tracker.start("one", {}, None)
    names = ("sums", "sums", "other")
    versions = [register(tracker, run, name, full, base, TASKS) for name in names]
    assert versions == ["sums/1", "sums/1", "other/1"]


def test_a_folder_that_mlflow_cannot_describe_fails_in_one_line_and_a_later_try_goes_on(
    tracker, base, full
):
    run = tracker.start("one", {}, None)
    config = full / "config.json"
    text = config.read_text()
    config.write_text(json.dumps({"model_type": "nothing"}))
    with pytest.raises(client.TrackingFailed, match="cannot register sums"):
        register(tracker, run, "sums", full, base, TASKS)
    config.write_text(text)
    register(tracker, run, "sums", full, base, TASKS)
    assert len(tracker.client.search_logged_models([tracker.experiment])) == 2


def test_a_deleted_experiment_is_named(tracker, tmp_path):
    tracker.client.delete_experiment(tracker.experiment)
    with pytest.raises(InputError, match=r"^tracking\.experiment: 'agcl' was deleted"):
        tracking.Tracker(tmp_path, None)


def test_a_servers_answer_to_a_large_file_is_waited_for(tracker, base, full, monkeypatch):
    """It comes once the server has passed the file on to a bucket."""
    given = []

    def log(owner, folder):
        largest = max(file.stat().st_size for file in Path(folder).rglob("*"))
        given.append((int(os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"]), largest // 100))

    monkeypatch.setattr(tracking, "_SLOWEST_UPLOAD", 100)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    monkeypatch.setattr(tracker.client._client, "log_model_artifacts", log)
    monkeypatch.setattr(tracker.client._client, "log_artifacts", log)
    run = tracker.start("one", {}, None)
    register(tracker, run, "sums", full, base, TASKS)
    tracker.artifacts(run, {"importance.safetensors": b"0" * 10_000})
    tracker.artifacts(run, {"metrics.json": "{}"})
    (of_model, size), of_importance, of_metrics = given
    assert of_model == size > 100
    assert of_importance == (100, 100)
    assert of_metrics == (20, 0)
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "20"
