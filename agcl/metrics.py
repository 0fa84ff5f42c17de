"""Continual-learning metrics: pure functions of the accuracy matrix.

The matrix has T + 1 rows and T columns: row i holds the scores of all tasks after training on
task i, row 0 those of the base model; column j is task j + 1. Scores are in [0, 1].
"""

from collections.abc import Sequence
from statistics import fmean

Matrix = Sequence[Sequence[float]]


def average_performance(matrix: Matrix) -> float:
    """Mean score over all tasks after training on the last one (TRACE's OP)."""
    return fmean(matrix[-1])


def average_incremental_performance(matrix: Matrix) -> float:
    """Mean over i of the mean score over tasks 1..i after training on task i."""
    return fmean(fmean(row[: i + 1]) for i, row in enumerate(matrix[1:]))


def learning_accuracy(matrix: Matrix) -> float:
    """Mean over tasks of the score right after training on the task."""
    return fmean(row[i] for i, row in enumerate(matrix[1:]))


def backward_transfer(matrix: Matrix) -> float | None:
    """Mean over tasks i < T of the final score minus the just-learned one; None for one task."""
    last = len(matrix[0]) - 1
    return fmean(matrix[-1][i] - matrix[i + 1][i] for i in range(last)) if last else None


def forward_transfer(matrix: Matrix) -> float | None:
    """Mean over tasks i > 1 of the score just before training minus the base model's score.

    None for one task.
    """
    later = range(1, len(matrix[0]))
    return fmean(matrix[i][i] - matrix[0][i] for i in later) if later else None


def forgetting(matrix: Matrix) -> list[float | None]:
    """Per task: best score after its training and before the last row, minus the final score.

    None for the last task, since no training followed it.
    """
    last = len(matrix[0]) - 1
    drops: list[float | None] = [
        max(row[i] for row in matrix[i + 1 : -1]) - matrix[-1][i] for i in range(last)
    ]
    return [*drops, None]


def summary(matrix: Matrix) -> dict[str, object]:
    """All metrics in `metrics.json` for one evaluation set.

    Raises `ValueError` unless the matrix has one more row than columns.
    """
    if any(len(row) != len(matrix) - 1 for row in matrix):
        raise ValueError("the accuracy matrix needs one more row than columns (row 0 = base)")
    per_task = forgetting(matrix)
    drops = [drop for drop in per_task if drop is not None]
    return {
        "accuracy_matrix": [list(row) for row in matrix],
        "average_performance": average_performance(matrix),
        "average_incremental_performance": average_incremental_performance(matrix),
        "backward_transfer": backward_transfer(matrix),
        "forgetting": {"per_task": per_task, "mean": fmean(drops) if drops else None},
        "forward_transfer": forward_transfer(matrix),
        "learning_accuracy": learning_accuracy(matrix),
    }
