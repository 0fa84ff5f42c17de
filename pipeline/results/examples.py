"""What a run's model answers, as examples, and how its loss fell: thinned out for the report."""

import json
from collections.abc import Sequence
from io import BytesIO
from statistics import fmean
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.plan.plan import Run
from pipeline.plan.stage import ResolvedStage
from pipeline.stages.files import LOG_FILE, PREDICTIONS

_OF_EACH = 2
"""Examples of each kind and task: forgotten, kept, never learned."""
_LONGEST = 300
"""Characters of a text."""
_POINTS = 80
"""Points of a loss curve."""
_MOMENTS = ("base", "learned", "final")
_COLUMNS = ("task", "evaluation_set", "predicted", "score")


def examples(run: Run, evaluation_set: str) -> dict[str, list[dict[str, Any]]]:
    """By task: rows that were forgotten, kept and never learned, a few of each if there are any.

    Each has `prompt`, `answer`, `kind`, and for the base model, the model right after the task's
    training and the final model (`base`, `learned`, `final`) the answer and its score in [0, 1].
    """
    evaluations = [stage for name, stage in run.resolved.items() if name.startswith("evaluate/")]
    first, *others = evaluations
    tables = [_read(first, (*_COLUMNS, "prompt", "answer")), *(_read(s, _COLUMNS) for s in others)]
    found = {}
    for number, task in enumerate(run.plan.tasks, start=1):
        learned = tables[min(number, len(others))]  # `joint`: once, for all tasks.
        # `solo`: each task has its own model.
        final = learned if run.config.method == "solo" else tables[-1]
        rows = [_of(table, task, evaluation_set) for table in (tables[0], learned, final)]
        if picked := _picked(rows):
            found[task] = picked
    return found


def _read(stage: ResolvedStage, columns: Sequence[str]) -> pa.Table:
    content = stage.read(PREDICTIONS)
    return pq.read_table(BytesIO(content or b""), columns=list(columns))


def _of(table: pa.Table, task: str, evaluation_set: str) -> pa.Table:
    of_task, of_set = pc.field("task") == task, pc.field("evaluation_set") == evaluation_set
    return table.filter(of_task & of_set)


def _picked(rows: Sequence[pa.Table]) -> list[dict[str, Any]]:
    _, learned, final = (table["score"].to_numpy() >= 0.5 for table in rows)
    kinds = {"forgotten": learned & ~final, "kept": learned & final, "not learned": ~learned}
    return [
        {
            "kind": kind,
            **{key: _cut(rows[0][key][index].as_py()) for key in ("prompt", "answer")},
            **{
                moment: [_cut(t["predicted"][index].as_py()), float(t["score"][index].as_py())]
                for moment, t in zip(_MOMENTS, rows, strict=True)
            },
        }
        for kind, chosen in kinds.items()
        for index in np.flatnonzero(chosen)[:_OF_EACH].tolist()
    ]


def _cut(text: str) -> str:
    """The beginning and the end: what a long prompt asks is often at its end."""
    half = _LONGEST // 2
    if len(text) <= _LONGEST:
        return text
    return f"{text[:half]} … {len(text) - 2 * half} characters … {text[-half:]}"


def losses(run: Run) -> dict[str, list[tuple[int, float]]]:
    """By train stage: last step and mean loss of each of at most 80 stretches of its training."""
    found = {}
    for name, stage in run.resolved.items():
        if name.startswith("train/"):
            lines = map(json.loads, (stage.read(LOG_FILE) or b"").splitlines())
            points = [(line["step"], line["loss"]) for line in lines if "loss" in line]
            size = -(-len(points) // _POINTS) or 1
            parts = [points[i : i + size] for i in range(0, len(points), size)]
            found[name] = [(part[-1][0], fmean(loss for _, loss in part)) for part in parts]
    return found
