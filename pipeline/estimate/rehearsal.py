"""Memory, disk and time that a run needs, measured by running its first stages on a few rows."""

import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import active_children, get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from agcl.tasks import TRAIN, VALIDATION
from agcl.throughput import highest_memory
from transformers.utils import logging

from pipeline.config.config import Config
from pipeline.config.loading import changed
from pipeline.config.resources import Resources
from pipeline.config.sources import (
    base_rows,
    held_out_sources,
    open_task,
    selection,
    sources,
)
from pipeline.config.task_section import Source
from pipeline.errors import Failed
from pipeline.execution.session import run_stages
from pipeline.plan.plan import Run
from pipeline.plan.schedule import needed_for
from pipeline.plan.stage import ResolvedStage, Stage, StageFunction
from pipeline.run import open_run
from pipeline.stages.attribute import attribute
from pipeline.stages.base_text import cut_text, write_own_text
from pipeline.stages.context import Context, Record
from pipeline.stages.evaluate import evaluate
from pipeline.stages.files import LOG_FILE, named
from pipeline.stages.metrics import report
from pipeline.stages.prepare import prepare
from pipeline.stages.train import idle_workers, passes_per_batch, rows_of, train

_BATCHES = 3
"""Batches of each task in the rehearsal. The first one warms up and is not timed."""
_WORKERS_SECONDS = 12.0
_SECONDS_ONCE: Mapping[StageFunction, float] = {prepare: 13.0, report: 7.0}
"""Startup of Ray Train and of Ray Data, and the report. Measured on two cores."""
_RAY_SLOWDOWN = 1.15
"""Slowdown of CPU stages by Ray's own processes when workers use every core. Measured on two."""
_Rows = dict[str, dict[str, int]]


class RehearsalFailed(Failed):
    """A stage failed in the rehearsal, so it would fail in the run."""

    def __str__(self) -> str:
        return f"the rehearsal on a few rows failed, and so would the run: {self.args[0]}"


@dataclass
class Needs:
    """What the unfinished stages of a run need."""

    worker_bytes: int
    """Peak memory of the rehearsal's process, or of its GPU."""
    disk_bytes: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    """By kind of stage, as its name begins; `start` is the startup of Ray plus the report."""
    warnings: list[str] = field(default_factory=list)


def estimate(run: Run, device: str = "cpu") -> Needs:
    """Run one stage of each unfinished kind on few rows and scale. Raises `RehearsalFailed`."""
    unfinished: dict[Path, Stage] = {}  # By folder, because equal stages share one artifact.
    for stage in run.plan.stages:
        if not (resolved := run.resolved[stage.name]).is_complete():
            unfinished.setdefault(resolved.folder, stage)
    todo = [stage for stage in unfinished.values() if stage.train or stage.fn is prepare]
    examples: dict[str, str] = {}
    # The base model's evaluation can include loading the model, so it is the last choice.
    for stage in sorted(todo, key=lambda stage: stage.name == "evaluate/0-base"):
        examples.setdefault(_kind(stage), stage.name)
    with TemporaryDirectory(prefix="agcl-rehearsal-") as scratch:
        rehearsal = open_run(_on_few_rows(run.config, scratch))
        small = {stage.name: stage for stage in rehearsal.plan.stages}
        needed = needed_for([small[name] for name in examples.values()], rehearsal.plan.stages)
        chosen = [rehearsal.resolved[stage.name] for stage in needed]
        needs = Needs(_peak_of(chosen, device, run.config.resources.cpus_per_worker) if todo else 0)
        few_rows, all_rows = _rows(rehearsal.config), _rows(run.config)
        for stage in todo:
            name = examples[_kind(stage)]
            few = _rows_in(small[name], few_rows)
            ratio = _rows_in(stage, all_rows) / few if few else 1.0  # Merging reads no rows.
            _add(needs, stage, ratio, rehearsal.resolved[name], run.config.resources)
    once = sum(_SECONDS_ONCE.get(fn, 0.0) for fn in {stage.fn for stage in unfinished.values()})
    needs.seconds["start"] = once + _WORKERS_SECONDS * any(stage.train for stage in todo)
    return needs


def _kind(stage: Stage) -> str:
    """Equal for stages that differ only in their rows and their number of past tasks."""
    roles = sorted({role.partition("/")[0] for role in stage.inputs})
    settings = {**stage.config, "seed": None, "new": None}
    if stage.fn is attribute and "rows" in stage.inputs:  # Those of the base are `rows/...`.
        settings["correct_only"] = None  # Differs by the task's scorer, and not in the rehearsal.
    return json.dumps([stage.fn.__name__, roles, settings], sort_keys=True)


def _on_few_rows(config: Config, storage: str) -> Config:
    sections = (config.training, config.importance, config.model.pretraining)
    most = _BATCHES * max(section.batch_size for section in sections)
    settings = {
        "storage": storage,
        "tracking.enabled": False,
        "resources.num_workers": 1,  # The rehearsal is one process, so one GPU is enough.
        "tasks.train_rows": min(most, config.tasks.train_rows or most),
        "tasks.test_rows": min(most, config.tasks.test_rows or most),
        "model.pretraining.epochs": 1,
        "training.epochs": 1,
        "base.samples": min(_BATCHES * config.importance.batch_size, config.base.samples),
        "importance.correct_only": False,  # After so little training, few answers are correct.
    }
    if config.evaluation.rows == "all" and any(map(_from_scored, sources(config))):
        # Such rows are trained on and scored like the others, and a share of few may be none.
        settings["evaluation.validation"] = 0.0
    if config.base.rows:
        settings["base.rows.train_rows"] = min(most, config.base.rows.train_rows or most)
    return changed(config, settings)


def _from_scored(source: Source) -> bool:
    """Whether validation rows are a share of the scored ones, which are those trained on."""
    task = open_task(source.settings, source.files)
    return task.memorized and VALIDATION not in task.splits


def _peak_of(stages: Sequence[ResolvedStage], device: str, num_threads: int) -> int:
    """Run stages in a process of their own, which frees its memory, and return its peak."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        try:
            return pool.submit(_run, stages, device, num_threads).result()
        except BrokenExecutor:
            raise RehearsalFailed("its process was killed, most likely out of memory") from None
        except KeyboardInterrupt:
            for process in active_children():
                process.kill()  # Otherwise leaving the pool waits for the last stage.
            raise


def _run(stages: Sequence[ResolvedStage], device: str, num_threads: int) -> int:
    logging.disable_progress_bar()
    torch.set_num_threads(num_threads)
    records: list[Record] = []
    try:
        run_stages(stages, Context(torch.device(device), ray_data=False), records.extend)
    except Exception:
        failed = next(record for record in records if record.get("state") == "failed")
        stage = next(stage for stage in stages if stage.folder.name == failed["artifact"])
        raise RehearsalFailed(f"{stage.name}: {failed['error']}") from None
    place = torch.device(device, torch.cuda.current_device()) if device == "cuda" else None
    return highest_memory(place or torch.device(device))


def _rows(config: Config) -> _Rows:
    """Rows to train on, to score and to store, by prepare stage."""
    rows = {}
    found = [
        (f"prepare/{s.name}", s, config) for s in [*sources(config), *held_out_sources(config)]
    ]
    if given := base_rows(config):
        found += [(f"prepare/base/{source.name}", source, given) for source in sources(given)]
    for name, source, of in found:
        task = open_task(source.settings, source.files, selection(of, source))
        count = {split: sum(1 for _ in read()) for split, read in task.splits.items()}
        scored = sum(count[split] for split in task.scored.values())
        rows[name] = count | {"scored": scored, "stored": sum(count.values())}
    return rows


def _rows_in(stage: Stage, rows: _Rows) -> float:
    """Rows that a stage processes, counting all epochs."""
    if stage.fn is prepare:
        return rows[stage.name]["stored"]
    total = float(stage.config["samples"]) if stage.fn in (write_own_text, cut_text) else 0.0
    for role, source in stage.inputs.items():
        if isinstance(source, Stage) and source.fn is prepare:
            share = stage.config["replay"] if role.startswith("replay/") else 1.0
            total += share * rows[source.name]["scored" if stage.fn is evaluate else TRAIN]
        elif isinstance(source, Stage) and source.fn in (write_own_text, cut_text):
            total += source.config["samples"]
    return float(stage.config.get("epochs", 1) * min(total, stage.config.get("samples") or total))


def _add(needs: Needs, stage: Stage, ratio: float, example: ResolvedStage, run: Resources) -> None:
    """Add a stage that has `ratio` times as many rows as its example in the rehearsal."""
    manifest = example.manifest() or {}
    files = {name: entry["bytes"] for name, entry in manifest["files"].items()}
    needs.disk_bytes += sum(files.values()) * (ratio if stage.fn is prepare else 1)
    if stage.fn is prepare:
        return
    log = map(json.loads, (example.read(LOG_FILE) or b"").splitlines())
    # Rows are timed from the first line on, after the warm-up. The rest hardly depends on rows, as
    # what an evaluation logs after its tasks.
    last = len(named("rows/", example.inputs)) if stage.fn is evaluate else math.inf
    at = [line["seconds"] for line in log if line["step"] <= last]
    for_rows = (at[-1] - at[0]) * len(at) / (len(at) - 1) if len(at) > 1 else manifest["seconds"]
    kind = stage.name.partition("/")[0]
    # Workers that share layers all pass every row; CorDA's decomposition is one worker's.
    by_layers = run.shard_model or stage.config.get("split") == "layers"
    shared: float = run.num_workers
    if kind == "corda" or (kind == "attribute" and by_layers):
        shared = 1
    elif stage.fn is train and run.num_workers > 1:
        passes = passes_per_batch(example.config, rows_of(example.config, example.inputs))
        shared = passes / math.ceil(passes / run.num_workers)
        idle = idle_workers(stage.config, passes, run.num_workers)
        if idle and idle not in needs.warnings:
            needs.warnings.append(idle)
    seconds = max(0.0, manifest["seconds"] - for_rows) + for_rows * ratio / shared
    seconds *= 1.0 if run.gpus_per_worker else _RAY_SLOWDOWN
    needs.seconds[kind] = needs.seconds.get(kind, 0.0) + seconds
