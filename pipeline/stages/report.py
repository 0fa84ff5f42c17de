"""Report: `metrics.json` from the rows of the accuracy matrix, and what the importances say."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow.parquet as pq
from agcl import metrics
from agcl.importance import Importance, by_layer_and_module, overlap

from pipeline.artifact import write_json
from pipeline.stages.context import Context
from pipeline.stages.evaluate import PREDICTIONS, TEXT
from pipeline.stages.train import CHECKS, IMPORTANCE_FILE

METRICS, IMPORTANCE_SUMMARY = "metrics.json", "importance.json"


def report(
    config: Mapping[str, Any], inputs: Mapping[str, Path], out_dir: Path, context: Context
) -> None:
    """Write `metrics.json`, and `importance.json` and `checks.json` if there is any.

    Inputs are `scores/0` ... `scores/T`, `importance/<task>` and `model/<stage>`; config holds
    method, seed, task names, held-out names, the main evaluation set and the share of rows that
    are for validation.
    """
    tasks, held_out, share = config["tasks"], config["held_out"], config["validation"]
    verdicts = [_verdicts(inputs[f"scores/{i}"], share) for i in range(len(tasks) + 1)]
    sets = _metrics(config, [test for test, _ in verdicts])
    main = config["evaluation_set"] or next(iter(sets))
    result = {
        "method": config["method"],
        "seed": config["seed"],
        "tasks": tasks,
        "evaluation_set": main,
        **sets[main],
        "evaluation_sets": sets,
        "held_out": {
            name: [next(iter(test[name].values())) for test, _ in verdicts] for name in held_out
        },
    }
    texts = [inputs[f"scores/{i}"] / TEXT for i in range(len(tasks) + 1)]
    if texts[0].exists():
        result["text_loss"] = [json.loads(file.read_text("utf-8"))["loss"] for file in texts]
    if share:
        result["validation"] = _metrics(config, [chosen_by for _, chosen_by in verdicts])
    write_json(out_dir / METRICS, result)
    files = {r.removeprefix("importance/"): p for r, p in inputs.items() if "importance/" in r}
    if files:
        importances = [Importance.load(folder / IMPORTANCE_FILE) for folder in files.values()]
        write_json(
            out_dir / IMPORTANCE_SUMMARY,
            {
                "tasks": list(files),
                "by_layer_and_module": [by_layer_and_module(i) for i in importances],
                "overlap": overlap(importances),
                "rows_attributed": [i.header["rows_attributed"] for i in importances],
            },
        )
    checks = {
        role.removeprefix("model/"): json.loads((folder / CHECKS).read_text(encoding="utf-8"))
        for role, folder in inputs.items()
        if role.startswith("model/") and (folder / CHECKS).exists()
    }
    if checks:
        write_json(out_dir / CHECKS, checks)


Scores = dict[str, dict[str, float]]
"""By task, then evaluation set."""


def _verdicts(folder: Path, share: float) -> tuple[Scores, Scores]:
    """Exact match over the test rows, and over the rows for validation.

    Which is which depends on the row alone, so that it stays when others come or go.
    """
    found: dict[tuple[str, str], tuple[list[bool], list[bool]]] = {}
    for row in pq.read_table(folder / PREDICTIONS).to_pylist():
        digest = hashlib.sha256(f"{row['prompt']}\0{row['answer']}".encode()).digest()
        for_validation = int.from_bytes(digest[:8], "big") < share * 2**64
        verdicts = found.setdefault((row["task"], row["evaluation_set"]), ([], []))
        verdicts[for_validation].append(row["correct"])
    test: Scores = {}
    validation: Scores = {}
    for (task, name), (for_test, to_choose_by) in found.items():
        if not for_test or (share and not to_choose_by):
            raise ValueError(
                f"evaluation.validation: {share} leaves {name} of task {task} no row on one side; "
                "choose another share"
            )
        test.setdefault(task, {})[name] = fmean(for_test)
        validation.setdefault(task, {})[name] = fmean(to_choose_by) if to_choose_by else 0.0
    return test, validation


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
