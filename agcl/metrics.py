"""Continual-learning metrics: pure functions of the accuracy matrix.

The matrix has T + 1 rows and T columns: row i holds the scores of all tasks after training task
i, row 0 those of the base model; column j is task j + 1. Scores are in [0, 1].
"""

from collections.abc import Sequence
from statistics import fmean

Matrix = Sequence[Sequence[float]]


def average_performance(matrix: Matrix) -> float:
    """Mean over all tasks after the last one (TRACE's OP)."""
    return fmean(matrix[-1])


def average_incremental_performance(matrix: Matrix) -> float:
    """Mean over i of the mean over tasks 1..i after training task i."""
    return fmean(fmean(row[: i + 1]) for i, row in enumerate(matrix[1:]))


def learning_accuracy(matrix: Matrix) -> float:
    """Mean score of every task right after it was trained."""
    return fmean(row[i] for i, row in enumerate(matrix[1:]))


def backward_transfer(matrix: Matrix) -> float | None:
    """Mean over tasks i < T of final minus just-learned, divided by T - 1; None for one task."""
    last = len(matrix[0]) - 1
    if last == 0:
        return None
    return fmean(matrix[-1][i] - matrix[i + 1][i] for i in range(last))


def forward_transfer(matrix: Matrix) -> float | None:
    """Mean over tasks i > 1 of the score just before training it minus the base model's."""
    num_tasks = len(matrix[0])
    if num_tasks == 1:
        return None
    return fmean(matrix[i][i] - matrix[0][i] for i in range(1, num_tasks))


def forgetting(matrix: Matrix) -> list[float | None]:
    """Per task: best score from its training up to before the end, minus the final score.

    None for the last task, which nothing was trained after.
    """
    last = len(matrix[0]) - 1
    drops: list[float | None] = [
        max(row[i] for row in matrix[i + 1 : -1]) - matrix[-1][i] for i in range(last)
    ]
    return [*drops, None]


def summary(matrix: Matrix) -> dict[str, object]:
    """Every metric of `metrics.json` for one evaluation set.

    Raises `ValueError` unless the matrix has one row more than columns.
    """
    if any(len(row) != len(matrix) - 1 for row in matrix):
        raise ValueError("the accuracy matrix needs one row more than columns (row 0 = base)")
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
