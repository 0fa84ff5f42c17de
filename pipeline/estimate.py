"""What a run will need, from running the first stages of its plan on a few rows of every task."""

import json
import resource
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import torch
from agcl.model import models
from agcl.tasks import TRAIN, EncodedRows, Row, Task, encode
from transformers.utils import logging

from pipeline.config.config import Config
from pipeline.config.sources import open_task
from pipeline.plan.plan import Run
from pipeline.plan.stage import External, Stage, StageFunction
from pipeline.stages.attribute import attribute
from pipeline.stages.context import Context
from pipeline.stages.evaluate import evaluate
from pipeline.stages.files import SUMMARY, rows_file
from pipeline.stages.metrics import report
from pipeline.stages.prepare import make_tokenizer, prepare
from pipeline.stages.train import pretrain, train
from pipeline.storage.artifact import write_json

_BATCHES = 3
"""Batches of every task that are run."""
_WORKERS_SECONDS = 12.0
_SECONDS_ONCE: Mapping[StageFunction, float] = {prepare: 13.0, report: 7.0}
"""Starts of Ray Train and Ray Data, and the report; on two cores, measured."""
_BESIDE_RAY = 1.15
"""Times as long as alone a stage takes on a CPU whose cores are all the workers': Ray's processes
wake some hundred times a second, each in the way of a thread that the others then wait for. On two
cores, measured."""
_KINDS = {"pretrain": pretrain, "train": train, "attribute": attribute, "evaluate": evaluate}


class ProbeFailed(Exception):
    """The probe ended with an error: the run would too."""


@dataclass
class Cost:
    """What stages of one kind took on the probe's rows."""

    seconds_a_row: float = 0.0
    fixed_seconds: float = 0.0
    fixed_bytes: int = 0
    """Size of an artifact; rows in it count little."""


@dataclass
class Needs:
    """An estimate for the stages of a run that are not done yet."""

    worker_bytes: int
    """The most memory that the probe's process, or its GPU, had."""
    disk_bytes: int = 0
    checkpoint_bytes: int = 0
    """While a task trains, for what it would go on from: weights and the two states of Adam."""
    seconds: dict[str, float] = field(default_factory=dict)
    """By kind of stage; `start` is of Ray's sessions, with the report."""


def estimate(run: Run, device: str = "cpu") -> Needs:
    """Probe in a process of its own, which gives its memory back. Writes nothing that stays.

    Raises `ProbeFailed` with the error of the stage that failed, as where memory does not suffice.
    """
    context = get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_probe, args=(run.config, device, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        answer = ours.recv()
    except EOFError:
        process.join()
        raise ProbeFailed(
            f"its process was killed (exit {process.exitcode}); most likely the memory did not do"
        ) from None
    finally:
        ours.close()
    process.join()
    if isinstance(answer, str):
        raise ProbeFailed(answer)
    costs, sizes, worker_bytes = answer
    return _for_all_stages(run, costs, sizes, worker_bytes)


@dataclass(frozen=True)
class Size:
    """How much of a task there is."""

    train_rows: int
    scored_rows: int
    stored_bytes: int


def peak_memory() -> int:
    """The most memory that this process had so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # What rusage says begins with what the parent had.
        (line,) = [x for x in status.read_text().splitlines() if x.startswith("VmHWM")]
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _for_all_stages(
    run: Run, costs: Mapping[str, Cost], sizes: Mapping[str, Size], worker_bytes: int
) -> Needs:
    needs = Needs(worker_bytes)
    workers = run.config.resources.num_workers
    open_stages = [s for s in run.plan.stages if not run.resolved[s.name].is_complete()]
    for stage in open_stages:
        if stage.fn is prepare:
            needs.disk_bytes += sizes[stage.name.partition("/")[2]].stored_bytes
        if not (kind := _kind(stage)):
            continue
        cost = costs[_key(stage)]
        taken = cost.fixed_seconds + cost.seconds_a_row * _rows(stage, sizes) / workers
        if not run.config.resources.gpus_per_worker:
            taken *= _BESIDE_RAY
        needs.seconds[kind] = needs.seconds.get(kind, 0.0) + taken
        needs.disk_bytes += cost.fixed_bytes
        if kind == "train" and run.config.resources.checkpoint_minutes:
            needs.checkpoint_bytes = 3 * cost.fixed_bytes
    starts = _WORKERS_SECONDS if any(stage.train for stage in open_stages) else 0.0
    starts += sum(_SECONDS_ONCE.get(fn, 0.0) for fn in {stage.fn for stage in open_stages})
    if starts:
        needs.seconds["start"] = starts
    return needs


def _kind(stage: Stage) -> str | None:
    """Of a stage that is timed."""
    return next((kind for kind, fn in _KINDS.items() if fn is stage.fn), None)


def _key(stage: Stage) -> str:
    """What costs alike: a kind of stage, and training with something to protect apart."""
    return f"{_kind(stage)}{' protected' if stage.config.get('protect') else ''}"


def _rows(stage: Stage, sizes: Mapping[str, Size]) -> float:
    """Rows that pass through the model in a stage, the epochs counted."""
    of = {
        role: sizes[source.name.partition("/")[2]]
        for role, source in stage.inputs.items()
        if isinstance(source, Stage) and source.fn is prepare
    }
    if stage.fn is evaluate:
        return sum(size.scored_rows for size in of.values())
    rows: float = of["rows"].train_rows
    if stage.fn is attribute:
        return min(rows, stage.config["samples"] or rows)
    share = stage.config.get("replay", 0.0)
    rows += sum(share * size.train_rows for role, size in of.items() if role != "rows")
    return float(stage.config["epochs"] * rows)


def _probe(config: Config, device: str, end: Any) -> None:
    """In its own process: sends costs by kind, sizes by task and the most memory, or an error."""
    from pipeline.run import open_run

    logging.disable_progress_bar()
    torch.set_num_threads(config.resources.cpus_per_worker)
    stage_name = "prepare"
    try:
        with TemporaryDirectory(prefix="agcl-probe-") as scratch:
            run = open_run(config)
            sampled = _Sampled(run, Path(scratch), torch.device(device))
            for stage in run.plan.stages:
                stage_name = stage.name
                sampled.run(stage)
            end.send((sampled.costs, sampled.sizes, sampled.peak()))
    except Exception as error:
        end.send(f"{stage_name}: {type(error).__name__}: {' '.join(str(error).split())}")


class _Sampled:
    """The stages of a plan on a few rows: the first of every kind, and what it needs."""

    def __init__(self, run: Run, scratch: Path, device: torch.device) -> None:
        self.real, self.scratch = run, scratch
        self.context = Context(device=device)
        self.made: dict[str, Path] = {}
        self.costs: dict[str, Cost] = {}
        self.sizes: dict[str, Size] = {}
        training, importance = run.config.training, run.config.importance
        self.num_rows = _BATCHES * max(training.batch_size, importance.batch_size)

    def peak(self) -> int:
        """Bytes."""
        if self.context.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.context.device)
        return peak_memory()

    def run(self, stage: Stage) -> None:
        """Run a stage on what there is of its inputs, if that is enough."""
        inputs = {
            role: source.path if isinstance(source, External) else self.made.get(source.name)
            for role, source in stage.inputs.items()
        }
        known = {role: path for role, path in inputs.items() if path is not None}
        timed = _kind(stage) is not None
        if len(known) < len(inputs) or (timed and self._is_known(stage)):
            return
        if not (timed or stage.fn in (make_tokenizer, prepare)):
            return
        out_dir = self.scratch / str(len(self.made))
        out_dir.mkdir()
        if timed:
            self._timed(stage, known, out_dir)
        elif stage.fn is prepare:
            self._prepare(stage, known, out_dir)
        else:
            stage.fn(stage.config, known, out_dir, self.context)
        self.made[stage.name] = out_dir

    def _is_known(self, stage: Stage) -> bool:
        """Whether a stage like it was timed; an evaluation would say once how long it took, so the
        one that warms up is none to time."""
        trained = any(key.startswith("train") for key in self.costs)
        return _key(stage) in self.costs or (stage.fn is evaluate and not trained)

    def _timed(self, stage: Stage, inputs: Mapping[str, Path], out_dir: Path) -> None:
        at: list[float] = []
        self.context.log = lambda metrics, step: at.append(time.perf_counter())
        self.context.folder = out_dir
        config = {**stage.config}
        config |= {key: value for key, value in _SHORT.items() if key in config}
        started = time.perf_counter()
        stage.fn(config, inputs, out_dir, self.context)
        taken = time.perf_counter() - started
        rows = max(
            1, round(_rows(Stage("", stage.fn, config, stage.inputs), self._sampled_sizes()))
        )
        # The first step warms up; a log that is written once says only how long all took.
        inner = (at[-1] - at[0]) * len(at) / (len(at) - 1) if len(at) > 1 else taken
        inner = min(inner, taken)
        self.costs[_key(stage)] = Cost(
            seconds_a_row=inner / rows,
            fixed_seconds=taken - inner,
            fixed_bytes=sum(f.stat().st_size for f in out_dir.rglob("*") if f.is_file()),
        )

    def _sampled_sizes(self) -> dict[str, Size]:
        least = {name: min(self.num_rows, size.train_rows) for name, size in self.sizes.items()}
        return {
            name: Size(least[name], self._scored(self.made[f"prepare/{name}"]), 0)
            for name in self.sizes
        }

    def _scored(self, folder: Path) -> int:
        scored = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))["scored"]
        return sum(len(EncodedRows(folder / rows_file(split))) for split in scored.values())

    def _prepare(self, stage: Stage, inputs: Mapping[str, Path], out_dir: Path) -> None:
        """A few rows of every split, and how many there are of all."""
        tokenizer = models.load_tokenizer(inputs["tokenizer"])
        files = {r.removeprefix("file/"): p for r, p in inputs.items() if r.startswith("file/")}
        task: Task = open_task(stage.config["task"], files, stage.config["selection"])
        counts, stored = {}, 0.0
        for split, source in task.splits.items():
            rows = iter(source())
            few: list[Row] = list(islice(rows, self.num_rows))
            counts[split] = len(few) + sum(1 for _ in rows)
            table = encode(tokenizer, few, chat=stage.config["chat_template"])
            with (
                pa.OSFile(str(out_dir / rows_file(split)), "wb") as sink,
                pa.ipc.new_file(sink, table.schema) as writer,
            ):
                writer.write_table(table)
            stored += table.nbytes * counts[split] / max(1, len(few))
        write_json(out_dir / SUMMARY, {"scored": dict(task.scored), "scorer": task.scorer})
        scored = sum(counts[split] for split in task.scored.values())
        self.sizes[stage.name.partition("/")[2]] = Size(counts[TRAIN], scored, round(stored))


_SHORT = {"epochs": 1, "correct_only": False}
"""Settings that the probe's stages have in place of the run's."""
