"""Evaluate: one row of the accuracy matrix, every evaluation set of every task."""

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from agcl import models
from agcl.evaluate import predict, text_loss
from agcl.tasks import EncodedRows

from pipeline.artifact import write_json
from pipeline.stages.context import Context
from pipeline.stages.prepare import SUMMARY

SCORES, PREDICTIONS, TEXT = "scores.json", "predictions.parquet", "text.json"


def evaluate(
    config: Mapping[str, Any], inputs: Mapping[str, Path], out_dir: Path, context: Context
) -> None:
    """Write `scores.json`: per prepared task and evaluation set, the share of exact matches.

    Beside it `predictions.parquet`, from which every number can be computed again: one row a
    scored row, with `predicted` the greedy answer as far as it is right and the model's
    teacher-forced choice after that. Inputs are `model`, `rows/<task>` and perhaps `text`, on
    which the loss goes into `text.json`.
    """
    model = context.take_model(inputs["model"])
    tokenizer = models.load_tokenizer(inputs["model"])
    scores: dict[str, dict[str, float]] = {}
    tables = []
    tasks = {r.removeprefix("rows/"): path for r, path in inputs.items() if "/" in r}
    for number, (task, folder) in enumerate(tasks.items(), start=1):
        scored = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))["scored"]
        for name, split in scored.items():
            rows = EncodedRows(folder / f"{split}.arrow")
            predicted = predict(
                model, rows, batch_size=config["batch_size"], precision=config["precision"]
            )
            correct = [
                ids == row.input_ids[row.prompt_tokens :]
                for ids, row in zip(predicted, map(rows.__getitem__, range(len(rows))), strict=True)
            ]
            scores.setdefault(task, {})[name] = fmean(correct)
            tables.append(
                pa.table(
                    {
                        "task": [task] * len(rows),
                        "evaluation_set": [name] * len(rows),
                        "row": range(len(rows)),
                        "prompt": rows.table["prompt"],
                        "answer": rows.table["answer"],
                        "predicted": tokenizer.batch_decode(predicted, skip_special_tokens=True),
                        "correct": correct,
                    }
                )
            )
        context.log({f"{name}/{task}": scores[task][name] for name in scored}, number)
    if "text" in inputs:
        text = inputs["text"].read_text(encoding="utf-8")
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][: config["text_tokens"]]
        loss = text_loss(model, ids, precision=config["precision"])
        context.log({"text_loss": loss}, len(tasks) + 1)
        if context.is_first_worker:
            write_json(out_dir / TEXT, {"loss": loss, "tokens": len(ids)})
    if context.is_first_worker:
        pq.write_table(pa.concat_tables(tables), out_dir / PREDICTIONS)
        write_json(out_dir / SCORES, scores)
    context.hold_model(model, inputs["model"])
