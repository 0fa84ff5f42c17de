"""What an evaluation found, as metrics by task index, and when a stage ran."""

import json
from statistics import fmean

from pipeline.config.sources import BASE_TASK
from pipeline.plan.plan import Run
from pipeline.plan.stage import ResolvedStage
from pipeline.stages.files import BASE_KNOWLEDGE, SCORES


def scores_of(run: Run, resolved: ResolvedStage, index: int) -> dict[str, float]:
    """The row of the accuracy matrix and what the base model still knows, by task index."""
    tasks, scores = run.plan.tasks, json.loads(resolved.read(SCORES) or b"")
    row: dict[str, float] = {
        f"{name}/{task}": score for task in tasks for name, score in scores[task].items()
    }
    if BASE_TASK in scores.keys() - set(tasks):
        row["base/facts"] = next(iter(scores[BASE_TASK].values()))
    for name in scores[tasks[0]]:
        # Of `solo` each task has a model of its own, which knows no other.
        if run.config.method != "solo" and all(name in scores[task] for task in tasks):
            seen = [scores[task][name] for task in tasks[: max(index, 1)]]
            row[f"{name}/average_of_seen_tasks"] = fmean(seen)
    base = json.loads(resolved.read(BASE_KNOWLEDGE) or b"{}")
    row |= {f"base/{key}": base[key] for key in ("text_loss", "kl", "kl_answers") if key in base}
    for name, of_probe in base.get("probes", {}).items():
        row[f"base/probes/{name}"] = of_probe["acc_norm"]
    return {"step": index, **row}


def task_index(stage: str) -> int:
    """How many tasks of the sequence were trained before `evaluate/2-rivers`."""
    return int(stage.partition("/")[2].partition("-")[0])


def times(resolved: ResolvedStage) -> tuple[float, float]:
    """When a complete stage was started and finished, in seconds since 1970.

    With the latter a point is in MLflow once, however often it is sent.
    """
    manifest = resolved.manifest() or {}
    return manifest["started"], manifest["started"] + manifest["seconds"]
