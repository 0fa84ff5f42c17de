"""What the pipeline adds to the work of its stages, and what a long sequence costs."""

import io
import time
from collections.abc import Sequence
from inspect import signature
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import torch
from reference.tiny import exact_match
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from agcl.attribution import attribute
from agcl.importance import Importance, running_sum
from agcl.lrp import attributed_linears
from agcl.model import models
from agcl.model.builtin import BUILTIN, builtin_model, builtin_tokenizer
from agcl.modulation import GatedAdamW, bases
from agcl.tasks import TRAIN, Encoded, encode, facts
from agcl.tasks.batches import collate, in_order
from agcl.throughput import peak_memory
from agcl.train import train_task
from bench.measure import Figure, figure
from bench.shapes import SHAPES, save_random
from pipeline.config.config import Config
from pipeline.config.sources import open_task, selection, sources
from pipeline.execution.cluster import cluster
from pipeline.execution.scheduler import run_with_progress
from pipeline.plan.schedule import sessions
from pipeline.run import open_run
from pipeline.stages.context import Context
from pipeline.stages.files import PAST_FILE
from pipeline.stages.train import train

TASKS = 3
ENERGY = 0.8
_EPOCHS = 25
"""Of a late task's training, for which few would be over before they can be timed."""


def whole_pipeline(model: str, num_pairs: int, threads: int, device: str) -> Figure:
    """A run of three tasks once Ray is up, against the same work in one plain loop.

    Both prepare, train with a projection, attribute and evaluate every task after each. Notes the
    seconds that a stage costs beyond its work, Ray's sessions included.
    """
    taken, stages = [], 1
    with TemporaryDirectory() as scratch:
        base = _model_folder(model, Path(scratch))
        configs = [
            _config(base, Path(scratch) / str(i), threads, gpus=int(device != "cpu"))
            for i in range(num_pairs)
        ]
        with cluster(configs[0].resources) as side_by_side:
            for config in configs:
                run = open_run(config)
                todo = sessions({"bench": run.plan.stages}, config.storage)
                stages = sum(len(session.stages) for session in todo)
                started = time.perf_counter()
                failures = run_with_progress(
                    todo,
                    run.folder,
                    config.resources,
                    lambda records: None,
                    Console(file=io.StringIO()),
                    side_by_side=side_by_side,
                )
                for failure in failures:
                    raise failure
                between = time.perf_counter()
                _plain_loop(config, base, device)
                taken.append((between - started, time.perf_counter() - between))
    beyond = median(ours - loop for ours, loop in taken) / stages
    note = f"{beyond:.2f} s a stage beyond its work"
    return figure("pipeline", taken, 1.2, "the same work in one plain loop", note=note)


def late_task(num_pairs: int, threads: int, device: str) -> list[Figure]:
    """Time and memory of training task 30 against task 2, on the built-in model.

    Each is the train stage in its own process, with the sum of the importances of all tasks before
    it, as a run has it.
    """
    times, memory = [], []
    with TemporaryDirectory() as scratch:
        inputs = _inputs_of_tasks((2, 30), Path(scratch))
        _train_stage(inputs[2], threads, device)  # Reads into the disk's cache what both need.
        for _ in range(num_pairs):
            late, early = (_train_stage(inputs[number], threads, device) for number in (30, 2))
            times.append((late[0], early[0]))
            memory.append((late[1], early[1]))
    return [
        figure("task_30_time", times, 1.05, "task 2"),
        figure("task_30_memory", memory, 1.05, "task 2", "MB"),
    ]


def train_stage_seconds(tasks: Sequence[int]) -> dict[int, float]:
    """Seconds of the train stage of the given task numbers, from 2 on."""
    with TemporaryDirectory() as scratch:
        inputs = _inputs_of_tasks(tasks, Path(scratch))
        return {number: _train_stage(inputs[number])[0] for number in tasks}


def _model_folder(model: str, scratch: Path) -> Path:
    if model in SHAPES:
        return save_random(scratch / "base", SHAPES[model], builtin_tokenizer(_words()))
    if model != BUILTIN:
        return Path(model)
    models.save(*_builtin(), scratch / "base")
    return scratch / "base"


def _builtin() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    tokenizer = builtin_tokenizer(_words())
    return builtin_model(len(tokenizer), seed=0), tokenizer


def _words() -> list[str]:
    return [row.prompt + row.answer for row in _rows_of(0)]


def _rows_of(index: int) -> list[Any]:
    return list(facts.task(index, entities=12, base_entities=0, seed=0).splits[TRAIN]())


def _config(base: Path, storage: Path, threads: int, gpus: int = 0) -> Config:
    return Config.model_validate(
        {
            "name": "bench",
            "storage": storage,
            "model": {"path": str(base)},
            "tasks": {"format": "facts", "count": TASKS, "entities": 12},
            "training": {"epochs": 4, "batch_size": 16, "learning_rate": 1e-4},
            "importance": {"correct_only": False},
            "protect": [{"kind": "project", "energy": ENERGY}],
            "resources": {"cpus_per_worker": threads, "gpus_per_worker": gpus},
        }
    )


def _plain_loop(config: Config, base: Path, device: str) -> None:
    model, tokenizer = models.load_model(base).to(device), models.load_tokenizer(base)
    rows: list[dict[str, list[Encoded]]] = []
    for source in sources(config):
        task = open_task(source.settings, source.files, selection(config, source))
        encoded = {name: _encoded(tokenizer, list(split())) for name, split in task.splits.items()}
        rows.append(encoded)
    options = config.training.model_dump()
    rate, decay = options.pop("learning_rate"), options.pop("weight_decay")
    options = {key: options[key] for key in options.keys() & signature(train_task).parameters}

    def evaluate() -> None:
        for splits in rows:
            for scored in splits.values():
                exact_match(model, scored, batch_size=config.evaluation.batch_size)

    evaluate()
    past: list[Importance] = []
    for number, splits in enumerate(rows, start=1):
        names = set(attributed_linears(model)) if past else set(dict(model.named_parameters()))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)
        basis = bases(past, energy=ENERGY, device=device) if past else None
        named = [(n, p) for n, p in model.named_parameters() if n in names]
        optimizer = GatedAdamW(named, basis=basis, lr=rate, weight_decay=decay)
        train_task(model, splits[TRAIN], optimizer, seed=number, **options)
        model.requires_grad_(True)
        batches = in_order(len(splits[TRAIN]), config.importance.batch_size)
        past.append(
            attribute(
                model,
                (collate([splits[TRAIN][i] for i in indices]) for indices in batches),
                top_k=config.importance.top_k,
                moments="relevance",
                entries=config.measures_entries,
                correct_only=False,
            )
        )
        evaluate()


def _encoded(tokenizer: PreTrainedTokenizerBase, rows: list[Any]) -> list[Encoded]:
    table = encode(tokenizer, rows)
    columns = (table[name].to_pylist() for name in ("input_ids", "prompt_tokens"))
    return [Encoded(*row) for row in zip(*columns, strict=True)]


def _inputs_of_tasks(numbers: Sequence[int], folder: Path) -> dict[int, dict[str, Path]]:
    """Per task, the model, rows and past tasks' summed importance that its train stage takes."""
    model, tokenizer = _builtin()
    models.save(model, tokenizer, folder / "model")
    table = encode(tokenizer, _rows_of(1))
    (folder / "rows").mkdir()
    with (
        pa.OSFile(str(folder / "rows" / f"{TRAIN}.arrow"), "wb") as sink,
        pa.ipc.new_file(sink, table.schema) as writer,
    ):
        writer.write_table(table)
    inputs, past = {}, []
    for task in range(1, max(numbers)):
        batch = collate(_encoded(tokenizer, _rows_of(task)))
        options = {"moments": "relevance", "entries": False, "correct_only": False}
        past.append(attribute(model, [batch], **options))
        past = [running_sum(past, keep=past[-1].header["keep"])] if len(past) > 1 else past
        if task + 1 in numbers:
            found = folder / f"past-{task}"
            found.mkdir()
            past[0].save(found / PAST_FILE)
            inputs[task + 1] = {"model": folder / "model", "rows": folder / "rows", "past": found}
    return inputs


def _train_stage(
    inputs: dict[str, Path], threads: int = 2, device: str = "cpu"
) -> tuple[float, float]:
    """Seconds of the train stage, and the most memory its process had, or on a GPU, in MB."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_in_own_process, args=(inputs, threads, device, theirs))
    process.start()
    theirs.close()
    taken: tuple[float, float] = ours.recv()
    process.join()
    return taken


def _in_own_process(inputs: dict[str, Path], threads: int, device: str, end: Any) -> None:
    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    with TemporaryDirectory() as storage:
        stages = open_run(_config(inputs["model"], Path(storage), threads)).plan.stages
    settings = next(stage.config for stage in stages if stage.name.startswith("train/2"))
    torch.zeros(1, device=device)  # Starting CUDA is no part of the stage.
    started = time.perf_counter()
    with TemporaryDirectory() as out_dir:
        train({**settings, "epochs": _EPOCHS}, inputs, Path(out_dir), Context(torch.device(device)))
    taken = time.perf_counter() - started
    peak = peak_memory() if device == "cpu" else torch.cuda.max_memory_allocated()
    end.send((taken, peak / 1e6))
