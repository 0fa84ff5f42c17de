"""Metrics on a matrix of three tasks, computed by hand."""

import pytest

from agcl import metrics

MATRIX = [
    [0.1, 0.2, 0.3],  # base
    [0.9, 0.25, 0.35],  # after task 1
    [0.7, 0.8, 0.4],  # after task 2
    [0.5, 0.85, 1.0],  # after task 3
]


def test_three_tasks_by_hand():
    assert metrics.average_performance(MATRIX) == pytest.approx((0.5 + 0.85 + 1.0) / 3)
    assert metrics.average_incremental_performance(MATRIX) == pytest.approx(
        (0.9 + (0.7 + 0.8) / 2 + (0.5 + 0.85 + 1.0) / 3) / 3
    )
    assert metrics.learning_accuracy(MATRIX) == pytest.approx((0.9 + 0.8 + 1.0) / 3)
    assert metrics.backward_transfer(MATRIX) == pytest.approx((0.5 - 0.9 + 0.85 - 0.8) / 2)
    assert metrics.forward_transfer(MATRIX) == pytest.approx((0.25 - 0.2 + 0.4 - 0.3) / 2)
    assert metrics.forgetting(MATRIX) == [pytest.approx(0.4), pytest.approx(-0.05), None]


def test_forgetting_is_measured_from_the_best_score_between_training_and_the_end():
    matrix = [[1.0, 0.0, 0.0], [0.6, 0.9, 0.0], [0.8, 0.7, 0.0], [0.3, 0.75, 1.0]]
    # Task 1 was best after task 2; the base model's 1.0 does not count, nor does task 2's
    # score before it was trained.
    assert metrics.forgetting(matrix) == [pytest.approx(0.5), pytest.approx(-0.05), None]


def test_summary_holds_every_metric_under_its_name():
    summary = metrics.summary(MATRIX)
    assert summary == {
        "accuracy_matrix": MATRIX,
        "average_performance": metrics.average_performance(MATRIX),
        "average_incremental_performance": metrics.average_incremental_performance(MATRIX),
        "backward_transfer": metrics.backward_transfer(MATRIX),
        "forgetting": {"per_task": metrics.forgetting(MATRIX), "mean": pytest.approx(0.175)},
        "forward_transfer": metrics.forward_transfer(MATRIX),
        "learning_accuracy": metrics.learning_accuracy(MATRIX),
    }


def test_one_task_has_no_transfer_and_no_forgetting():
    summary = metrics.summary([[0.25], [0.75]])
    assert summary["average_performance"] == 0.75
    assert summary["average_incremental_performance"] == 0.75
    assert summary["learning_accuracy"] == 0.75
    assert summary["backward_transfer"] is None
    assert summary["forward_transfer"] is None
    assert summary["forgetting"] == {"per_task": [None], "mean": None}


@pytest.mark.parametrize(
    "matrix",
    [
        [[0.1, 0.2], [0.3, 0.4]],
        [[0.1], [0.2], [0.3]],
        [[0.1, 0.2], [0.3], [0.5, 0.6]],
    ],
)
def test_a_matrix_of_the_wrong_shape_is_refused(matrix):
    with pytest.raises(ValueError, match="one more row than columns"):
        metrics.summary(matrix)
