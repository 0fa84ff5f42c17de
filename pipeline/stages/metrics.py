"""Metrics: the accuracy matrix, what is computed from it, and a summary of the importances."""

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow.parquet as pq
from agcl import metrics
from agcl.importance import Importance, by_layer_and_module, overlap
from agcl.tasks import VALIDATION

from pipeline.config.naming import CHANGES
from pipeline.stages.context import Context
from pipeline.stages.files import (
    BASE_KNOWLEDGE,
    CHECKS,
    IMPORTANCE_FILE,
    IMPORTANCE_SUMMARY,
    METRICS,
    PREDICTIONS,
    named,
)
from pipeline.storage.artifact import write_json

Scores = dict[str, dict[str, float]]
"""By task, then evaluation set."""


def report(
    config: Mapping[str, Any], inputs: Mapping[str, Path], out_dir: Path, context: Context
) -> None:
    """Write `metrics.json`; with importances `importance.json`, with protections `checks.json`.

    Inputs are `scores/0` ... `scores/T`, `importance/<task>` and `model/<stage>`. The config holds
    method, seed, task names, the name of the base model's facts among the scores or None, the
    headline evaluation set, the share of validation rows, and whether only validation rows were
    scored. If so, the metrics are computed from the validation rows.
    """
    if not context.is_rank_zero:
        return
    tasks, share, only = config["tasks"], config["validation"], config["only_validation"]
    folders = [inputs[f"scores/{i}"] for i in range(len(tasks) + 1)]
    scores = [_scores(folder, share, only=only) for folder in folders]
    sets = _metrics(config, [test for test, _ in scores])
    main = config["evaluation_set"] if config["evaluation_set"] in sets else next(iter(sets))
    result = {
        "method": config["method"],
        "seed": config["seed"],
        "tasks": tasks,
        "evaluation_set": main,
        **sets[main],
        "evaluation_sets": sets,
    }
    if kept := _kept(config["facts"], folders, [test for test, _ in scores]):
        result["base"] = kept
    if share:
        result["validation"] = _metrics(config, [validation for _, validation in scores])
    write_json(out_dir / METRICS, result)
    importances = {
        task: Importance.load(folder / IMPORTANCE_FILE, verify=False)
        for task, folder in named("importance/", inputs).items()
    }
    if importances:
        write_json(out_dir / IMPORTANCE_SUMMARY, _importance_summary(importances))
    checks = {
        stage: json.loads((folder / CHECKS).read_text(encoding="utf-8"))
        for stage, folder in named("model/", inputs).items()
        if (folder / CHECKS).exists()
    }
    if checks:
        write_json(out_dir / CHECKS, checks)


def _kept(facts: str | None, folders: list[Path], rows: list[Scores]) -> dict[str, Any]:
    """What the models still know of what the base knew: lists with one number per model.

    Each comes from the model that was scored, so that of `solo` knows one task.
    """
    files = [folder / BASE_KNOWLEDGE for folder in folders]
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    kept: dict[str, Any] = {
        key: [each[key] for each in found] for key in found[0] if key != "probes"
    }
    for key, score in (("probes", "acc_norm"), ("probes_acc", "acc")):
        if "probes" in found[0]:
            names = found[0]["probes"]
            kept[key] = {n: [each["probes"][n][score] for each in found] for n in names}
    if facts:
        kept["facts"] = [next(iter(row[facts].values())) for row in rows]
    return kept


def _importance_summary(by_task: Mapping[str, Importance]) -> dict[str, Any]:
    importances = list(by_task.values())
    summary = {
        "tasks": list(by_task),
        "rows_attributed": [i.header["rows_attributed"] for i in importances],
    }
    if all(i.entries for i in importances):
        summary["by_layer_and_module"] = [by_layer_and_module(i) for i in importances]
        summary["overlap"] = overlap(importances)
    return summary


def _scores(folder: Path, share: float, *, only: bool) -> tuple[Scores, Scores]:
    """Mean scores of the test rows and of the validation rows; with `only`, the latter twice.

    Validation rows are those of the task's validation set, or without one (a task that is scored
    on its training rows) a share of the scored facts. Raises `ValueError` if that share leaves no
    test row or no validation row.
    """
    rows = pq.read_table(folder / PREDICTIONS).to_pylist()
    has_set = {row["task"] for row in rows if _is_validation(row["evaluation_set"])}
    found: dict[tuple[str, str], tuple[list[float], list[float]]] = {}
    for row in rows:
        if row["task"] in has_set:
            for_validation = _is_validation(row["evaluation_set"])
        else:
            for_validation = bool(share) and row["position"] < share
        values = found.setdefault((row["task"], row["evaluation_set"]), ([], []))
        values[for_validation].append(row["score"])
    test: Scores = {}
    validation: Scores = {}
    for (task, name), (of_test, of_validation) in found.items():
        if task not in has_set and not only and (not of_test or (share and not of_validation)):
            missing = "validation" if of_test else "test"
            raise ValueError(
                f"evaluation.validation: {share} leaves no {missing} row in {name} of task {task}; "
                "choose another share"
            )
        if of_test:
            test.setdefault(task, {})[name] = fmean(of_test)
        if of_validation:
            validation.setdefault(task, {})[name] = fmean(of_validation)
    return (validation if only else test), validation


def _is_validation(evaluation_set: str) -> bool:
    """True also for the set with another scorer, `validation-rouge_l`."""
    return evaluation_set.partition("-")[0] == VALIDATION


def _metrics(config: Mapping[str, Any], rows: list[Scores]) -> dict[str, dict[str, Any]]:
    """Metrics by evaluation set, for the sets that all tasks have."""
    tasks = config["tasks"]
    sets = {}
    for name in rows[0][tasks[0]]:
        if any(name not in rows[0][task] for task in tasks):
            continue
        matrix = [[row[task][name] for task in tasks] for row in rows]
        if config["method"] == "solo":
            # Each task has its own model, so its score after training never changes.
            own = [matrix[j + 1][j] for j in range(len(tasks))]
            matrix = [[*own[:i], *row[i:]] for i, row in enumerate(matrix)]
        sets[name] = metrics.summary(matrix)
        if config["method"].removesuffix(CHANGES) == "joint":  # It may protect the base model.
            sets[name]["forward_transfer"] = None  # No task comes before another.
    return sets
