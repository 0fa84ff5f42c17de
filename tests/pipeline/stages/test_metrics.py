"""The report stage on the predictions of a recorded run."""

import json

import pytest
from reference.record_run import RECORDED, WITH_PREDICTIONS, recorded

from pipeline.stages.context import Context
from pipeline.stages.metrics import report


@pytest.fixture(scope="module")
def metrics(tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    config = {
        "method": "sequential",
        "seed": 0,
        "tasks": ["harbour", "valley", "island"],
        "facts": "base",
        "evaluation_set": "memorization",
        "validation": 0.0,
        "only_validation": False,
    }
    inputs = {f"scores/{i}": RECORDED / WITH_PREDICTIONS / "scores" / str(i) for i in range(4)}
    report(config, inputs, out, Context())
    assert [file.name for file in out.iterdir()] == ["metrics.json"]
    return json.loads((out / "metrics.json").read_text())


def test_recorded_predictions_give_the_recorded_metrics(metrics):
    # A run adds its name, what its method is, and its tasks' scorers when it writes its results.
    of_run = recorded(WITH_PREDICTIONS).metrics
    added = {
        "name": "facts",
        "description": of_run["description"],
        "scorers": dict.fromkeys(metrics["tasks"], "exact_match"),
    }
    assert {**metrics, **added} == of_run


def test_every_metric_follows_from_the_matrix(metrics):
    assert list(metrics["evaluation_sets"]) == ["memorization", "generalization"]
    for values in (metrics, *metrics["evaluation_sets"].values()):
        (a0, b0, c0), (a1, b1, c1), (a2, b2, c2), (a3, b3, c3) = values["accuracy_matrix"]
        # All twelve rows of a task are scored.
        assert all(round(s * 12) == pytest.approx(s * 12) for s in (a0, b1, c0, c1, a2, c2, b3))
        expected = {
            "average_performance": (a3 + b3 + c3) / 3,
            "average_incremental_performance": (a1 + (a2 + b2) / 2 + (a3 + b3 + c3) / 3) / 3,
            "backward_transfer": (a3 - a1 + b3 - b2) / 2,
            "forward_transfer": (b1 - b0 + c2 - c0) / 2,
            "learning_accuracy": (a1 + b2 + c3) / 3,
        }
        assert {key: values[key] for key in expected} == pytest.approx(expected)
        drops = [max(a1, a2) - a3, b2 - b3]
        assert values["forgetting"]["per_task"] == [*map(pytest.approx, drops), None]
        assert values["forgetting"]["mean"] == pytest.approx(sum(drops) / 2)
    assert len(metrics["base"]["facts"]) == 4
