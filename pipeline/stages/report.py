"""Report: `metrics.json` from the rows of the accuracy matrix, and what the importances say."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agcl import metrics
from agcl.importance import Importance, by_layer_and_module, overlap

from pipeline.artifact import write_json
from pipeline.stages.context import Context
from pipeline.stages.evaluate import SCORES
from pipeline.stages.train import IMPORTANCE_FILE

METRICS, IMPORTANCE_SUMMARY = "metrics.json", "importance.json"


def report(
    config: Mapping[str, Any], inputs: Mapping[str, Path], out_dir: Path, context: Context
) -> None:
    """Write `metrics.json`, and `importance.json` if there are importances.

    Inputs are `scores/0` ... `scores/T` and `importance/<task>`; config holds method, seed, task
    names, held-out names and the main evaluation set.
    """
    tasks, held_out = config["tasks"], config["held_out"]
    rows = [
        json.loads((inputs[f"scores/{i}"] / SCORES).read_text(encoding="utf-8"))
        for i in range(len(tasks) + 1)
    ]
    sets = {
        name: metrics.summary([[row[task][name] for task in tasks] for row in rows])
        for name in rows[0][tasks[0]]
        if all(name in rows[0][task] for task in tasks)
    }
    main = config["evaluation_set"] or next(iter(sets))
    write_json(
        out_dir / METRICS,
        {
            "method": config["method"],
            "seed": config["seed"],
            "tasks": tasks,
            "evaluation_set": main,
            **sets[main],
            "evaluation_sets": sets,
            "held_out": {
                name: [next(iter(row[name].values())) for row in rows] for name in held_out
            },
        },
    )
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
