"""What MLflow must hold for a complete run of the built-in facts."""

import json

import mlflow


def check_whole(uri, run):
    """Assert that every stage is recorded once and finished, with the artifacts' numbers once."""
    client = mlflow.MlflowClient(uri)
    parent = json.loads((run.folder / "mlflow.json").read_text())["run_id"]
    experiment = client.get_experiment_by_name("agcl").experiment_id
    stages = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'")
    assert sorted(stage.info.run_name for stage in stages) == sorted(run.resolved)
    assert {stage.info.status for stage in stages} == {"FINISHED"}
    assert client.get_run(parent).info.status == "FINISHED"

    def points(run_id, key):
        return sorted((point.step, point.value) for point in client.get_metric_history(run_id, key))

    for stage in stages:
        if stage.info.run_name.startswith(("train", "pretrain")):
            log = run.resolved[stage.info.run_name].folder / "log.jsonl"
            lines = [json.loads(line) for line in log.read_text().splitlines()]
            assert len(lines) > 1
            assert points(stage.info.run_id, "loss") == [(e["step"], e["loss"]) for e in lines]
    metrics = json.loads((run.resolved["report"].folder / "metrics.json").read_text())
    rows = metrics["evaluation_sets"]["memorization"]["accuracy_matrix"]
    for column, task in enumerate(metrics["tasks"]):
        expected = [(index, row[column]) for index, row in enumerate(rows)]
        assert points(parent, f"memorization/{task}") == expected
    for key in ("facts", "kl_answers"):
        assert points(parent, f"base/{key}") == [*enumerate(metrics["base"][key])]
    average = metrics["average_performance"]
    assert points(parent, "average") == [(len(metrics["tasks"]), average)]
