"""`report.html`: one self-contained page on one or several runs over the same tasks."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from pipeline.config.presets import METHODS
from pipeline.results.comparison import BASELINE, BOUNDS, Line, compare
from pipeline.results.results import (
    METRIC_TITLES,
    Group,
    RunResult,
    entry_importances,
    evaluation_sets,
    groups,
    labels,
    metric,
)
from pipeline.results.templates import render, score
from pipeline.storage.artifact import write_text

LOWER_IS_BETTER = {"forgetting"}
HEADLINE_METHODS = 4


def write_report(file: Path, runs: Sequence[RunResult], *, title: str) -> dict[str, bytes]:
    """Write the report on these runs to `file` atomically; return its figures as PNG, by name.

    Raises `ValueError` if there are no runs, or if they learned different tasks.
    """
    if not runs:
        raise ValueError("a report needs at least one run")
    tasks = list(runs[0].metrics["tasks"])
    for run in runs:
        if list(run.metrics["tasks"]) != tasks:
            raise ValueError(
                "a report compares runs over one sequence of tasks, "
                f"but got {', '.join(tasks)} and {', '.join(run.metrics['tasks'])}"
            )
    from pipeline.results.figures import draw  # Matplotlib takes a second to import.

    pictures = draw(runs)
    by_method = groups(runs)
    tables: list[dict[str, Any]] = [
        {"set": name, "lines": lines, "best": _best(lines)}
        for name in evaluation_sets(runs)
        if (lines := compare(runs, name, list(METRIC_TITLES)))
    ]
    page = render(
        "report.html.j2",
        escape=True,
        title=title,
        tasks=tasks,
        runs=dict(zip(labels(runs), runs, strict=True)),
        headline=_headline(tables[0]["lines"], len(tasks)),
        tables=tables,
        has_seeds=len(by_method) < len(runs),
        pictures=pictures,
        text_losses={of.label: losses for of in by_method if (losses := _text_loss(of))},
        without_entries=[
            group.label
            for group in by_method
            if any(run.importance for run in group.runs) and not entry_importances(group)
        ],
        checks={of.label: worst for of in by_method if (worst := _worst_checks(of))},
        metric_titles=METRIC_TITLES,
        metric=metric,
        baseline=BASELINE,
        bounds=BOUNDS,
        methods=METHODS,
    )
    write_text(file, page)
    return {picture.file: picture.png for picture in pictures}


def _headline(lines: Sequence[Line], num_tasks: int) -> str:
    """Say in one sentence what each method keeps of what it learned, best method first."""
    shown = [line for line in lines if line.group.label not in BOUNDS] or lines
    shown = sorted(shown, key=lambda line: -line.metrics["average_performance"].mean)
    parts: list[str] = []
    for line in shown[:HEADLINE_METHODS]:
        seeds = len(line.group.runs)
        name = line.group.label + (f" ({seeds} seeds)" if seeds > 1 else "")
        kept, learned = _rounded(line, "average_performance"), _rounded(line, "learning_accuracy")
        if num_tasks == 1:
            parts.append(f"{name} scores {kept}" + ("" if parts else " after 1 task"))
        elif not parts:
            parts.append(
                f"{name} keeps {kept} of {learned} learned after {num_tasks} tasks "
                f"(backward transfer {_rounded(line, 'backward_transfer')})"
            )
        else:
            of = "" if learned == _rounded(shown[0], "learning_accuracy") else f" of {learned}"
            parts.append(f"{name} keeps {kept}{of} ({_rounded(line, 'backward_transfer')})")
    more = len(shown) - HEADLINE_METHODS
    return "; ".join(parts) + (f"; {more} more below." if more > 0 else ".")


def _rounded(line: Line, key: str) -> str:
    return score(line.metrics[key].mean, 2)


def _best(lines: Sequence[Line]) -> dict[str, str]:
    """The best score of each metric as it is shown, for metrics in which the methods differ."""
    best = {}
    for key in METRIC_TITLES:
        compared = [line.metrics.get(key) for line in lines if line.group.label not in BOUNDS]
        scores = {score(each.mean) for each in compared if each}
        if len(scores) > 1:
            best[key] = (min if key in LOWER_IS_BETTER else max)(scores, key=float)
    return best


def _text_loss(group: Group) -> list[float]:
    """Mean loss over seeds on the user's text, for the base model and after each task."""
    seeds = [run.metrics["text_loss"] for run in group.runs if "text_loss" in run.metrics]
    return [fmean(losses) for losses in zip(*seeds, strict=True)]


def _worst_checks(group: Group) -> dict[str, Any] | None:
    """Self-checks over all seeds and tasks; None for a method that protects nothing."""
    of_runs = [list(run.checks.values()) for run in group.runs if run.checks]
    if not of_runs:
        return None
    every = [check for checks in of_runs for check in checks]
    directions = _measured([checks[-1] for checks in of_runs], "directions_taken")
    return {
        "leak": max(_measured(every, "projection_leak"), default=None),
        "directions": fmean(directions) if directions else None,
        "movement": [
            fmean(tenth) for tenth in zip(*_measured(every, "movement_by_decile"), strict=True)
        ],
    }


def _measured(checks: Sequence[Mapping[str, Any]], key: str) -> list[Any]:
    return [check[key] for check in checks if check[key] is not None]
