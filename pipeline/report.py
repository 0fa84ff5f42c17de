"""`report.html`: one self-contained page on one or several runs over the same tasks.

Matplotlib is loaded only when a report is written, so importing the records here is cheap.
"""

import base64
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import jinja2


@dataclass(frozen=True)
class StageRecord:
    """One stage of a run: what it made, how long that took, or that it was there already."""

    name: str
    fingerprint: str
    seconds: float
    reused: bool


@dataclass(frozen=True)
class RunResult:
    """What a finished run leaves for its report.

    `metrics` is the content of `metrics.json`, `importance` that of the importance summary (None
    for methods without), `provenance` versions, git SHA and command.
    """

    metrics: Mapping[str, Any]
    config_yaml: str
    stages: Sequence[StageRecord]
    importance: Mapping[str, Any] | None
    provenance: Mapping[str, str]
    checks: Mapping[str, Mapping[str, Any]] | None = None


@dataclass(frozen=True)
class Group:
    """Runs shown as one line or heat map: the seeds of a method."""

    label: str
    runs: Sequence[RunResult]


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


def labels(runs: Sequence[RunResult]) -> list[str]:
    """Name each run: its method, with its seed where several runs share the method.

    Runs that share method and seed are told apart by a number.
    """
    methods = [str(run.metrics["method"]) for run in runs]
    names = [
        f"{method} seed {run.metrics['seed']}" if methods.count(method) > 1 else method
        for method, run in zip(methods, runs, strict=True)
    ]
    return [
        f"{name} #{names[: i + 1].count(name)}" if names.count(name) > 1 else name
        for i, name in enumerate(names)
    ]


def groups(runs: Sequence[RunResult]) -> list[Group]:
    """Gather the seeds of each method, in order of first appearance.

    A method that has one seed twice ran with different settings: its runs stay apart.
    """
    by_method: dict[str, list[tuple[str, RunResult]]] = {}
    for label, run in zip(labels(runs), runs, strict=True):
        by_method.setdefault(str(run.metrics["method"]), []).append((label, run))
    found = []
    for method, members in by_method.items():
        if len({run.metrics["seed"] for _, run in members}) == len(members):
            found.append(Group(method, [run for _, run in members]))
        else:
            found += [Group(label, [run]) for label, run in members]
    return found


def evaluation_sets(metrics: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """Give the metrics of every evaluation set of a run, by the set's name."""
    return metrics.get("evaluation_sets") or {metrics.get("evaluation_set", "score"): metrics}


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
    from pipeline.figures import figures

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


def _score(value: float | None, digits: int = 3) -> str:
    """Format a score; a rounded zero has no sign."""
    return "–" if value is None else f"{round(value, digits) + 0.0:.{digits}f}"


def _value(of_set: Mapping[str, Any], key: str) -> float | None:
    value = of_set[key]["mean"] if key == "forgetting" else of_set[key]
    return None if value is None else float(value)


def _mean(group: Group, evaluation_set: str, key: str) -> float | None:
    values = _values(group, evaluation_set, key)
    return fmean(values) if values else None


def _values(group: Group, evaluation_set: str, key: str) -> list[float]:
    sets = [evaluation_sets(run.metrics) for run in group.runs]
    values = [_value(each[evaluation_set], key) for each in sets if evaluation_set in each]
    return [value for value in values if value is not None]


def _primary(metrics: Mapping[str, Any]) -> str:
    """Name the evaluation set that the headline is about."""
    sets = evaluation_sets(metrics)
    name = str(metrics.get("evaluation_set"))
    return name if name in sets else next(iter(sets))


def _headline(runs: Sequence[RunResult]) -> str:
    """Say in one sentence what each method keeps of what it learned, best first."""
    name, num_tasks = _primary(runs[0].metrics), len(runs[0].metrics["tasks"])
    found = []
    for group in groups(runs):
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
    """Give each evaluation set its rows: every method, below it its seeds; best method marked."""
    names = dict(zip(map(id, runs), labels(runs), strict=True))
    all_groups = groups(runs)
    tables = []
    for name in dict.fromkeys(name for run in runs for name in evaluation_sets(run.metrics)):
        rows: list[dict[str, Any]] = []
        for group in all_groups:
            several = len(group.runs) > 1
            seeds = [Group(names[id(run)], [run]) for run in group.runs] if several else []
            for each in [group, *seeds]:
                cells = [_cell(each, name, key) for key in METRICS]
                if cells[0]["value"] is not None:
                    rows.append({"label": each.label, "seeds": len(each.runs), "cells": cells})
                    rows[-1]["is_seed"] = each is not group
        methods = [row for row in rows if not row["is_seed"]]
        for i, key in enumerate(METRICS):
            shown = {_score(row["cells"][i]["value"]) for row in methods} - {"–"}
            best = (min if key in LOWER_IS_BETTER else max)(shown, key=float, default=None)
            for row in methods:
                cell = row["cells"][i]
                cell["best"] = len(shown) > 1 and _score(cell["value"]) == best
        tables.append({"set": name, "rows": rows})
    return tables


def _cell(group: Group, evaluation_set: str, key: str) -> dict[str, Any]:
    values = _values(group, evaluation_set, key)
    spread = f"{_score(min(values))} to {_score(max(values))}" if len(values) > 1 else ""
    return {"value": fmean(values) if values else None, "spread": spread, "best": False}


def _pictures(runs: Sequence[RunResult], drawn: Mapping[str, bytes]) -> list[dict[str, Any]]:
    """Every figure with its bytes as a data address, its size at 96 dots per inch."""
    from pipeline import figures

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
                "width": width * 96 // figures.DPI,
                "height": height * 96 // figures.DPI,
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
    """Give each run with importances its rows attributed per task and its gate's summary."""
    return [
        {
            "label": label,
            "rows": list(
                zip(run.importance["tasks"], run.importance["rows_attributed"], strict=True)
            ),
            "gate": json.dumps(run.importance["gate"], indent=2, default=str, ensure_ascii=False)
            if run.importance.get("gate") is not None
            else "",
        }
        for label, run in zip(labels(runs), runs, strict=True)
        if run.importance is not None
    ]
