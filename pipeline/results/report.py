"""`report.html`: one self-contained page on one or several runs over the same tasks.

Matplotlib is loaded only when a report is written.
"""

import base64
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import jinja2

from pipeline.config.presets import METHODS
from pipeline.results.comparison import BASELINE, BOUNDS, compare
from pipeline.results.results import (
    LEFT_OUT,
    Group,
    RunResult,
    evaluation_sets,
    groups,
    labels,
    values,
)

METRICS = {  # column of the headline table: its title; its meaning stands in the template
    "average_performance": "Average performance",
    "backward_transfer": "Backward transfer",
    "learning_accuracy": "Learning accuracy",
    "forgetting": "Mean forgetting",
    "average_incremental_performance": "Average incremental performance",
    "forward_transfer": "Forward transfer",
}
LOWER_IS_BETTER = {"forgetting"}
HEADLINE_METHODS = 4


def write_report(file: Path, runs: Sequence[RunResult], *, title: str) -> dict[str, bytes]:
    """Write the page on these runs to `file`, whole or not at all; its figures as PNG by name.

    Raises `ValueError` where there is no run, or where the runs learned different tasks.
    """
    if not runs:
        raise ValueError("a report needs at least one run")
    if any(list(run.metrics["tasks"]) != list(runs[0].metrics["tasks"]) for run in runs):
        named = "; ".join(
            f"{label}: {', '.join(map(str, run.metrics['tasks']))}"
            for label, run in zip(labels(runs), runs, strict=True)
        )
        raise ValueError(f"a report compares runs over one sequence of tasks, but got {named}")
    from pipeline.results.figures import figures

    drawn = figures(runs)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # by the template's name alone, .j2, it would be off
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["score"] = _score
    page = environment.get_template("report.html.j2").render(
        title=title,
        headline=_headline(runs),
        primary=_primary(runs[0].metrics),
        tasks=list(runs[0].metrics["tasks"]),
        metrics=METRICS,
        tables=_tables(runs),
        baseline=BASELINE,
        descriptions={name: method.description for name, method in METHODS.items()},
        checks=_checks(runs),
        texts=_text_losses(runs),
        rows=_rows(runs[0]),
        pictures=_pictures(runs, drawn),
        shared=_shared_provenance(runs),
        importances=_importances(runs),
        runs=[
            {
                "label": label,
                "run": run,
                "sets": evaluation_sets(run.metrics),
                "seconds": sum(stage.seconds for stage in run.stages if not stage.reused),
                "reused": sum(stage.reused for stage in run.stages),
            }
            for label, run in zip(labels(runs), runs, strict=True)
        ],
    )
    aside = file.with_name(file.name + ".part")
    aside.write_text(page, encoding="utf-8")
    aside.replace(file)
    return drawn


def _rows(run: RunResult) -> list[dict[str, Any]]:
    """Describe every split of every task: the same for all runs of a report."""
    scorers = run.metrics.get("scorers", {})
    keys = ("rows", "tokens", "answer_tokens", *LEFT_OUT)
    return [
        {
            "task": task,
            "scorer": scorers.get(task, ""),
            "split": split,
            "counts": [counts[key] for key in keys],
        }
        for task, splits in run.rows.items()
        for split, counts in splits.items()
    ]


def _score(value: float | None, digits: int = 3) -> str:
    """Format a score; a rounded zero has no sign."""
    return "–" if value is None else f"{round(value, digits) + 0.0:.{digits}f}"


def _mean(group: Group, evaluation_set: str, key: str) -> float | None:
    found = values(group, evaluation_set, key)
    return fmean(found.values()) if found else None


def _primary(metrics: Mapping[str, Any]) -> str:
    """Name the evaluation set that the headline is about."""
    sets = evaluation_sets(metrics)
    name = str(metrics.get("evaluation_set"))
    return name if name in sets else next(iter(sets))


def _headline(runs: Sequence[RunResult]) -> str:
    """Say in one sentence what each method keeps of what it learned, best first."""
    name, num_tasks = _primary(runs[0].metrics), len(runs[0].metrics["tasks"])
    found = []
    shown = groups(runs)
    for group in [each for each in shown if each.label not in BOUNDS] or shown:
        kept = _mean(group, name, "average_performance")
        if kept is not None:
            learned = _score(_mean(group, name, "learning_accuracy"), 2)
            change = _mean(group, name, "backward_transfer")
            seeds = f" ({len(group.runs)} seeds)" if len(group.runs) > 1 else ""
            found.append((kept, learned, change, group.label + seeds))
    found.sort(key=lambda each: -each[0])
    first = found[0][1]
    parts = []
    for i, (kept, learned, change, label) in enumerate(found[:HEADLINE_METHODS]):
        if change is None:
            parts.append(f"{label} scores {_score(kept, 2)}" + (" after 1 task" if i == 0 else ""))
        elif i == 0:
            parts.append(
                f"{label} keeps {_score(kept, 2)} of {learned} learned after {num_tasks} tasks "
                f"(backward transfer {_score(change, 2)})"
            )
        else:
            of = f" of {learned}" if learned != first else ""
            parts.append(f"{label} keeps {_score(kept, 2)}{of} ({_score(change, 2)})")
    more = len(found) - HEADLINE_METHODS
    return "; ".join(parts) + (f"; {more} more below." if more > 0 else ".")


def _tables(runs: Sequence[RunResult]) -> list[dict[str, Any]]:
    """Give each evaluation set a row a method, the best marked, and one a seed where several."""
    tables = []
    for name in dict.fromkeys(name for run in runs for name in evaluation_sets(run.metrics)):
        lines = compare(runs, name, list(METRICS))
        rows: list[dict[str, Any]] = [
            {
                "label": line.group.label,
                "seeds": len(line.group.runs),
                "cells": [{"estimate": line.metrics.get(key), "best": False} for key in METRICS],
                "differences": line.differences,
            }
            for line in lines
        ]
        for i, key in enumerate(METRICS):
            cells = [
                row["cells"][i]
                for row in rows
                if row["cells"][i]["estimate"] and row["label"] not in BOUNDS
            ]
            shown = {_score(cell["estimate"].mean) for cell in cells}
            best = (min if key in LOWER_IS_BETTER else max)(shown, key=float, default=None)
            for cell in cells:
                cell["best"] = len(shown) > 1 and _score(cell["estimate"].mean) == best
        seeds = [
            {"label": label, "cells": [_mean(Group(label, [run]), name, key) for key in METRICS]}
            for label, run in zip(labels(runs), runs, strict=True)
            if len(lines) < len(runs) and name in evaluation_sets(run.metrics)
        ]
        tables.append({"set": name, "rows": rows, "seeds": seeds})
    return tables


def _text_losses(runs: Sequence[RunResult]) -> dict[str, list[float]]:
    """Give each method's loss on the user's text, of the base model and after each task."""
    found = {}
    for group in groups(runs):
        seeds = [run.metrics["text_loss"] for run in group.runs if "text_loss" in run.metrics]
        if seeds:
            found[group.label] = [fmean(losses) for losses in zip(*seeds, strict=True)]
    return found


def _checks(runs: Sequence[RunResult]) -> list[dict[str, Any]]:
    """Give each method that protects the worst that its seeds and tasks measured."""
    rows = []
    for group in groups(runs):
        found = [check for run in group.runs for check in (run.checks or {}).values()]
        last = [list(run.checks.values())[-1] for run in group.runs if run.checks]
        if found:
            deciles = [c["movement_by_decile"] for c in found if c["movement_by_decile"]]
            leaks = [c["projection_leak"] for c in found if c["projection_leak"] is not None]
            taken = [c["directions_taken"] for c in last if c["directions_taken"] is not None]
            rows.append(
                {
                    "label": group.label,
                    "movement": [fmean(each) for each in zip(*deciles, strict=True)],
                    "leak": max(leaks, default=None),
                    "taken": fmean(taken) if taken else None,
                }
            )
    return rows


def _pictures(runs: Sequence[RunResult], drawn: Mapping[str, bytes]) -> list[dict[str, Any]]:
    """Every figure with its bytes as a data address, its size at 96 dots per inch."""
    from pipeline.results import figures
    from pipeline.results.drawing import DPI

    found = []
    for plot in figures.plots(runs):
        png = drawn[plot.file]
        width, height = struct.unpack(">II", png[16:24])
        found.append(
            {
                "section": plot.section,
                "set": plot.evaluation_set,
                "file": plot.file,
                "label": plot.label,
                "source": "data:image/png;base64," + base64.b64encode(png).decode(),
                "width": width * 96 // DPI,
                "height": height * 96 // DPI,
            }
        )
    return found


def _shared_provenance(runs: Sequence[RunResult]) -> dict[str, str]:
    """Give what all runs have in common; the rest stands with each run."""
    first = runs[0].provenance
    return {
        key: value
        for key, value in first.items()
        if key != "command" and all(run.provenance.get(key) == value for run in runs)
    }


def _importances(runs: Sequence[RunResult]) -> list[dict[str, Any]]:
    """Give each run with importances its rows attributed per task."""
    return [
        {
            "label": label,
            "rows": list(
                zip(run.importance["tasks"], run.importance["rows_attributed"], strict=True)
            ),
        }
        for label, run in zip(labels(runs), runs, strict=True)
        if run.importance is not None
    ]
