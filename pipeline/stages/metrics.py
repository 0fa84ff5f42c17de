"""Report: `metrics.json` from the rows of the accuracy matrix, and what the importances say."""

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow.parquet as pq
from agcl import metrics
from agcl.importance import Importance, by_layer_and_module, overlap
from agcl.tasks import VALIDATION

from pipeline.stages.context import Context
from pipeline.stages.evaluate import is_for_validation
from pipeline.stages.files import (
    CHECKS,
    IMPORTANCE_FILE,
    IMPORTANCE_SUMMARY,
    METRICS,
    PREDICTIONS,
    TEXT,
)
from pipeline.storage.artifact import write_json


def report(
    config: Mapping[str, Any], inputs: Mapping[str, Path], out_dir: Path, context: Context
) -> None:
    """Write `metrics.json`, and `importance.json` and `checks.json` if there is any.

    Inputs are `scores/0` ... `scores/T`, `importance/<task>` and `model/<stage>`; config holds
    method, seed, task names, held-out names, the main evaluation set, the share of rows that are
    for validation and whether `only` they were scored; then they stand for the others too.
    """
    if not context.is_first_worker:
        return
    tasks, held_out, share = config["tasks"], config["held_out"], config["validation"]
    only = config.get("only_validation", False)
    scores = [_scores(inputs[f"scores/{i}"], share, only=only) for i in range(len(tasks) + 1)]
    sets = _metrics(config, [test for test, _ in scores])
    main = config["evaluation_set"] if config["evaluation_set"] in sets else next(iter(sets))
    result = {
        "method": config["method"],
        "seed": config["seed"],
        "tasks": tasks,
        "evaluation_set": main,
        **sets[main],
        "evaluation_sets": sets,
        "held_out": {
            name: [next(iter(test[name].values())) for test, _ in scores] for name in held_out
        },
    }
    texts = [inputs[f"scores/{i}"] / TEXT for i in range(len(tasks) + 1)]
    if texts[0].exists():
        result["text_loss"] = [json.loads(file.read_text("utf-8"))["loss"] for file in texts]
    if share:
        result["validation"] = _metrics(config, [chosen_by for _, chosen_by in scores])
    write_json(out_dir / METRICS, result)
    files = {r.removeprefix("importance/"): p for r, p in inputs.items() if "importance/" in r}
    if files:
        importances = [
            Importance.load(folder / IMPORTANCE_FILE, verify=False) for folder in files.values()
        ]
        summary = {
            "tasks": list(files),
            "rows_attributed": [i.header["rows_attributed"] for i in importances],
        }
        if all(i.entries for i in importances):
            summary["by_layer_and_module"] = [by_layer_and_module(i) for i in importances]
            summary["overlap"] = overlap(importances)
        write_json(out_dir / IMPORTANCE_SUMMARY, summary)
    checks = {
        role.removeprefix("model/"): json.loads((folder / CHECKS).read_text(encoding="utf-8"))
        for role, folder in inputs.items()
        if role.startswith("model/") and (folder / CHECKS).exists()
    }
    if checks:
        write_json(out_dir / CHECKS, checks)


Scores = dict[str, dict[str, float]]
"""By task, then evaluation set."""


def _scores(folder: Path, share: float, *, only: bool) -> tuple[Scores, Scores]:
    """Mean score of the test rows, and of the rows for validation; twice those, if they are `only`.

    A task's own validation set is for that. Of a task that has none (what it was trained on is
    what is scored), it is a share of the rows. Raises `ValueError` where test rows were scored and
    the share leaves no row on one side.
    """
    rows = pq.read_table(folder / PREDICTIONS).to_pylist()
    apart = {row["task"] for row in rows if _is_validation(row["evaluation_set"])}
    found: dict[tuple[str, str], tuple[list[float], list[float]]] = {}
    for row in rows:
        if row["task"] in apart:
            for_validation = _is_validation(row["evaluation_set"])
        else:
            for_validation = is_for_validation(row["prompt"], row["answer"], share=share)
        values = found.setdefault((row["task"], row["evaluation_set"]), ([], []))
        values[for_validation].append(row["score"])
    test: Scores = {}
    validation: Scores = {}
    for (task, name), (for_test, to_choose_by) in found.items():
        if task not in apart and not only and (not for_test or (share and not to_choose_by)):
            raise ValueError(
                f"evaluation.validation: {share} leaves {name} of task {task} no row on one side; "
                "choose another share"
            )
        if for_test:
            test.setdefault(task, {})[name] = fmean(for_test)
        if to_choose_by:
            validation.setdefault(task, {})[name] = fmean(to_choose_by)
    return (validation if only else test), validation


def _is_validation(evaluation_set: str) -> bool:
    """Also with another scorer, `validation-rouge_l`."""
    return evaluation_set.partition("-")[0] == VALIDATION


def _metrics(config: Mapping[str, Any], rows: list[Scores]) -> dict[str, dict[str, Any]]:
    """Metrics by evaluation set that all tasks have, from the scores after every task."""
    tasks = config["tasks"]
    sets = {}
    for name in rows[0][tasks[0]]:
        if any(name not in rows[0][task] for task in tasks):
            continue
        matrix = [[row[task][name] for task in tasks] for row in rows]
        if config["method"] == "solo":
            # A learned task is answered by its own model, which nothing changes any more.
            own = [matrix[j + 1][j] for j in range(len(tasks))]
            matrix = [[*own[:i], *row[i:]] for i, row in enumerate(matrix)]
        sets[name] = metrics.summary(matrix)
        if config["method"] == "joint":
            sets[name]["forward_transfer"] = None  # No task comes before another.
    return sets
