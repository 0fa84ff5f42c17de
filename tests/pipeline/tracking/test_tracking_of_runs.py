"""What MLflow shows of runs on Ray."""

import json
from pathlib import Path

import mlflow
import pytest
from mlflow.entities import ViewType

from agcl.importance import Importance
from pipeline.results.results import metric_name

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

LABELS = {"sequential", "gradient", "solo"}


@pytest.fixture(scope="module")
def client(finished):
    return mlflow.MlflowClient(tracking_uri=f"sqlite:///{finished.storage}/mlflow.db")


@pytest.fixture(scope="module")
def runs(client):
    """All runs of the experiment."""
    experiment = client.get_experiment_by_name("agcl")
    return client.search_runs(
        [experiment.experiment_id], run_view_type=ViewType.ALL, max_results=1000
    )


@pytest.fixture(scope="module")
def parents(runs):
    return {r.info.run_name: r for r in runs if r.data.tags.get("kind") == "sequence"}


def children(runs, parent):
    return [r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]


def history(client, run, key):
    found = client.get_metric_history(run.info.run_id, key)
    return sorted((point.step, point.value) for point in found)


def test_runs_of_a_comparison_lie_under_one_parent(runs, parents):
    (comparison,) = [r for r in runs if r.data.tags.get("kind") == "comparison"]
    assert set(parents) == LABELS
    assert {r.info.run_name for r in children(runs, comparison)} == LABELS


def test_the_comparison_has_the_table_the_headline_and_the_shared_settings(finished, runs):
    (comparison,) = [r for r in runs if r.data.tags.get("kind") == "comparison"]
    metrics, tags = comparison.data.metrics, comparison.data.tags
    averages = {label: finished.metrics(label)["average_performance"] for label in LABELS}
    assert metrics["memorization/sequential/average"] == averages["sequential"]
    assert metrics["average"] == max(averages.values())
    assert "keeps" in tags["mlflow.note.content"]
    assert "| method | average | backward transfer |" in tags["mlflow.note.content"]
    assert tags["methods"].split(", ")[0] == "sequential"
    assert tags["methods"].count("agcl+changes") == 2  # With another gate, and with both kinds.
    best = max(LABELS, key=lambda of: finished.metrics(of)["average_performance"])
    assert metrics["average"] == finished.metrics(best)["average_performance"]
    assert comparison.data.params["training.epochs"] == "12"
    assert "method" not in comparison.data.params


def test_every_stage_is_one_child_of_its_run(finished, runs, parents):
    for label, parent in parents.items():
        resolved = finished.runs[label].resolved.values()
        # On a busy machine MLflow may fail to answer; a child made again replaces a deleted one.
        active = [r for r in children(runs, parent) if r.info.lifecycle_stage == "active"]
        found = [r.data.tags["fingerprint"] for r in active]
        assert sorted(found) == sorted({stage.fingerprint for stage in resolved})


def test_every_run_is_finished_with_times(runs):
    assert {r.info.status for r in runs} == {"FINISHED"}
    assert all(r.info.end_time >= r.info.start_time for r in runs)
    assert not any("error" in r.data.tags for r in runs)


def test_children_can_be_found_by_stage_and_task(client, runs, parents):
    parent = parents["gradient"].info
    (found,) = client.search_runs(
        [parent.experiment_id],
        f"tags.`mlflow.parentRunId` = '{parent.run_id}' and tags.stage = 'train' "
        "and tags.task = '2-valley'",
    )
    assert found.info.run_name == "train/2-valley"
    assert found.data.params["protect.0.on"] == "gradient"


def test_losses_are_logged_by_step(finished, client, runs, parents):
    for label in ("sequential", "solo"):
        for child in children(runs, parents[label]):
            if child.data.tags["stage"] != "train":
                continue
            stage = child.info.run_name
            if stage not in finished.runs[label].resolved:
                continue
            file = finished.artifact(label, stage) / "log.jsonl"
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            assert [line["step"] for line in lines] == list(range(1, 25))  # 12 epochs of 12 rows
            for key in ("loss", "gradient_norm"):
                expected = [(line["step"], line[key]) for line in lines]
                assert history(client, child, key) == expected
            assert lines[-1]["loss"] < lines[0]["loss"] / 2


def test_the_matrix_is_logged_by_task_index(finished, client, parents):
    for label, parent in parents.items():
        metrics = finished.metrics(label)
        for name, values in metrics["evaluation_sets"].items():
            for column, task in enumerate(metrics["tasks"]):
                expected = [(i, row[column]) for i, row in enumerate(values["accuracy_matrix"])]
                assert history(client, parent, f"{name}/{task}") == expected
        assert set(metrics["base"]) >= {"facts", "kl_answers"}
        for key in metrics["base"].keys() - {"probes", "probes_acc"}:
            assert history(client, parent, f"base/{key}") == [*enumerate(metrics["base"][key])]


def test_final_metrics_are_on_the_parent_at_the_last_task(finished, client, parents):
    for label, parent in parents.items():
        metrics = finished.metrics(label)
        for key in ("average_performance", "backward_transfer", "learning_accuracy"):
            assert (2, metrics[key]) in history(client, parent, metric_name(key))
        assert (2, metrics["forgetting"]["mean"]) in history(client, parent, "forgetting")


def test_the_resolved_config_is_the_parents_params(finished, parents):
    params = parents["solo"].data.params
    assert params["training.epochs"] == "12"
    assert params["training.weight_decay"] == "0.01"
    assert params["tasks.format"] == "facts"
    assert params["protect.0.kind"] == "gate"
    assert params["protect.1.energy"] == "0.8"
    assert params["importance.source"] == "solo"
    assert parents["sequential"].data.tags["method"] == "sequential"


def test_prepared_rows_are_inputs_of_every_run(parents, client):
    for parent in parents.values():
        inputs = client.get_run(parent.info.run_id).inputs.dataset_inputs
        names = sorted(entry.dataset.name for entry in inputs)
        assert names == ["prepare/base", "prepare/harbour", "prepare/valley"]


def paths(client, run, folder=None):
    found = []
    for file in client.list_artifacts(run.info.run_id, folder):
        found += paths(client, run, file.path) if file.is_dir else [file.path]
    return found


def test_importances_and_figures_are_artifacts_of_the_parent(finished, client, parents, tmp_path):
    for label, parent in parents.items():
        found = paths(client, parent)
        assert {"config.yaml", "metrics.json", "metrics.csv", "base.csv", "report.html"} <= set(
            found
        )
        pictures = [path for path in found if path.startswith("figures/")]
        assert pictures
        for path in pictures[:2]:
            file = client.download_artifacts(parent.info.run_id, path, str(tmp_path))
            assert Path(file).read_text(encoding="utf-8").startswith("<?xml")
        maps = [path for path in found if path.endswith("importance.safetensors")]
        assert len(maps) == {"sequential": 0, "gradient": 2, "solo": 3}[label]  # With the base's.
        for path in [path for path in maps if "1-harbour" in path]:
            file = client.download_artifacts(parent.info.run_id, path, str(tmp_path))
            stored = finished.artifact(label, "attribute/1-harbour") / "importance.safetensors"
            assert Path(file).read_bytes() == stored.read_bytes()


def test_artifacts_lie_in_the_storage_folder(finished, parents):
    for parent in parents.values():
        assert parent.info.artifact_uri.startswith(finished.storage.as_uri())


def test_a_run_whose_stages_are_all_there_is_recorded_in_full(
    finished, client, tiny_config, run_configs, undrawn
):
    config = tiny_config(finished.storage, method="sequential", name="second")
    folder = finished.root / "second"
    run_configs({"run": config}, folder)
    parent = client.get_run(json.loads((folder / "run" / "mlflow.json").read_text())["run_id"])
    stages = client.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    )
    assert {r.info.run_name for r in stages} == set(finished.runs["sequential"].resolved)
    assert {r.data.tags.get("reused") for r in stages} == {"true"}
    assert {r.info.status for r in stages} == {"FINISHED"}
    matrix = finished.metrics("sequential")["accuracy_matrix"]
    expected = [(i, row[0]) for i, row in enumerate(matrix)]
    assert history(client, parent, "memorization/harbour") == expected


def test_a_stage_that_was_finished_unseen_is_closed_by_the_next_run(
    finished, client, tiny_config, run_configs, undrawn
):
    # A driver killed between a stage's last write and its next look leaves its run open.
    folder = finished.folder / "gradient"
    parent = json.loads((folder / "mlflow.json").read_text())["run_id"]
    experiment = client.get_experiment_by_name("agcl").experiment_id
    where = f"tags.`mlflow.parentRunId` = '{parent}' and tags.task = '2-valley'"
    open_runs = client.search_runs([experiment], where)
    assert len(open_runs) == 3
    for run in (*open_runs, client.get_run(parent)):
        client.update_run(run.info.run_id, status="RUNNING")
    run_configs({"gradient": finished.configs["gradient"]}, finished.folder)
    assert {r.info.status for r in client.search_runs([experiment], where)} == {"FINISHED"}
    assert client.get_run(parent).info.status == "FINISHED"


def test_the_saved_importance_is_readable_by_itself(finished):
    folder = finished.folder / "solo" / "attribute-2-valley"
    importance = Importance.load(folder / "importance.safetensors")
    assert importance.header["rows_attributed"] > 0
