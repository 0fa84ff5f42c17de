"""Evaluate: one row of the accuracy matrix, every evaluation set of every task."""

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from agcl.evaluate import exact_match
from agcl.tasks import EncodedRows

from pipeline.artifact import write_json
from pipeline.stages.context import Context
from pipeline.stages.prepare import SUMMARY

SCORES = "scores.json"


def evaluate(
    config: Mapping[str, Any], inputs: Mapping[str, Path], out_dir: Path, context: Context
) -> None:
    """Write `scores.json`: per prepared task and evaluation set, the share of exact matches.

    Inputs are `model` and `rows/<task>` for every task.
    """
    model = context.take_model(inputs["model"])
    scores: dict[str, dict[str, float]] = {}
    tasks = {r.removeprefix("rows/"): path for r, path in inputs.items() if r != "model"}
    for number, (task, folder) in enumerate(tasks.items(), start=1):
        scored = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))["scored"]
        for name, split in scored.items():
            verdicts = exact_match(
                model,
                EncodedRows(folder / f"{split}.arrow"),
                batch_size=config["batch_size"],
                precision=config["precision"],
            )
            scores.setdefault(task, {})[name] = fmean(verdicts)
        context.log({f"{name}/{task}": scores[task][name] for name in scored}, number)
    if context.is_first_worker:
        write_json(out_dir / SCORES, scores)
    context.hold_model(model, inputs["model"])
