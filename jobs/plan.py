"""`agcl plan`: the stages of a config, which of them are done, and what the others need."""

import argparse
import re
from collections.abc import Iterator
from dataclasses import replace

import torch
from rich.console import Console
from rich.markup import escape

from agcl.errors import InputError
from agcl.model.check import has_weights
from pipeline.config import loading
from pipeline.config.check import missing_package
from pipeline.config.config import Config
from pipeline.config.recommended import count_text, too_long_for_batches, unusual
from pipeline.config.resources import Resources
from pipeline.config.weights import slow_here
from pipeline.estimate.disk import disk_per_task
from pipeline.estimate.fitting import USABLE, fits, on_device, remedy
from pipeline.estimate.memory import main_memory, peaks
from pipeline.estimate.rehearsal import Needs, estimate
from pipeline.estimate.setting import Part, Setting, setting_of, total
from pipeline.execution.progress import warn
from pipeline.plan.plan import Run
from pipeline.run import open_run

_MB, _GB, _MOST = 10**6, 10**9, 10**15


def main(arguments: argparse.Namespace, command: str) -> None:
    """Print one line per stage and an estimate for the unfinished ones."""
    given = arguments.gpu_memory
    memory = _memory_here() if given is None else memory_of(given)
    config = loading.load(arguments.config, arguments.settings)
    run = open_run(config, weights=False, devices=False)
    console = Console(highlight=False, soft_wrap=True)
    width = max(len(stage.name) for stage in run.plan.stages)
    num_done = 0
    for stage in run.plan.stages:
        resolved = run.resolved[stage.name]
        done = resolved.is_complete()
        num_done += done
        state = "[green]done  [/]" if done else "to run"
        place = f"[dim]{escape(resolved.place)}[/]"
        console.print(f"  {state}  {escape(f'{stage.name:{width}}')}  {place}")
    console.print(f"{num_done} of {len(run.plan.stages)} stages are done")
    if given is None and (slow := slow_here(run.config)):
        warn(console, slow)
    if not run.config.model.is_builtin:
        setting = setting_of(run.config)
        for line in (
            *unusual(run.config, setting.shape.weights),
            *too_long_for_batches(run.config),
        ):
            warn(console, line)
        for line in _predicted(setting, memory):
            console.print(line)
        if memory and not setting.on_gpu:
            console.print("  this config runs on CPUs (resources.gpus_per_worker is 0)")
    if num_done < len(run.plan.stages) and not arguments.formula_only:
        _rehearse(run, console)


def _rehearse(run: Run, console: Console) -> None:
    """Run a few rows, and print what the rest needs; or why that cannot be done."""
    resources = run.config.resources
    if why_not := _why_no_rehearsal(run.config):
        console.print(f"no rehearsal on a few rows: {escape(why_not)}")
        return
    console.print("[dim]rehearsing on a few rows of each task ...[/]")
    needs = estimate(run, "cuda" if resources.gpus_per_worker else "cpu")
    for line in needs.warnings:
        warn(console, line)
    for line in _lines(needs, resources):
        console.print(line)


def _why_no_rehearsal(config: Config) -> str | None:
    """What a few rows cannot be run without; None if all is here."""
    model, resources = config.model, config.resources
    if not model.is_builtin and not has_weights(model.folder):
        return f"no weights in {model.folder}"
    if resources.shard_model:
        return "it would need the whole model on one device"
    if resources.gpus_per_worker and not torch.cuda.is_available():
        return "resources.gpus_per_worker is set, but this machine has no GPU"
    return missing_package(config)


def memory_of(text: str) -> int:
    """Bytes of `80GB`, `80 GiB` or `80`, which is in GB. Raises `InputError` for another text."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GB|GiB)?", text.strip(), re.IGNORECASE)
    size = float(found[1]) * (2**30 if (found[2] or "").lower() == "gib" else _GB) if found else 0.0
    if not 0 < size < _MOST:
        raise InputError(f"--gpu-memory: {text!r} is not a size such as 80GB")
    return int(size)


def _memory_here() -> int | None:
    """Memory of this machine's GPU, in bytes; None without one."""
    if not torch.cuda.is_available():
        return None
    return int(torch.cuda.get_device_properties(0).total_memory)


def _predicted(setting: Setting, memory: int | None) -> Iterator[str]:
    """Lines on every kind of stage: its peak by the formula, and whether it fits a GPU."""
    if memory:
        share = min(1.0, setting.config.resources.gpus_per_worker or 1.0)
        memory = int(memory * share)  # Other runs have the rest of a GPU that they share.
        resources = setting.config.resources.model_copy(update={"gpus_per_worker": 1})
        setting = replace(
            setting, config=setting.config.model_copy(update={"resources": resources})
        )
    row, of_base = setting.row, setting.of_base
    yield (
        f"predicted for {count_text(setting.shape.weights)} weights and rows of up to "
        f"{row.tokens} tokens, {row.answer} of them answers"
        + (f", the base model measured on up to {of_base.tokens}" if of_base else "")
        + " (agcl/SPEED.md has the formula):"
    )
    where = "on the GPU" if setting.on_gpu else "beyond Python's own"
    for kind, parts in peaks(setting).items():
        size = total(parts, on_gpu=setting.on_gpu)
        largest = sorted(parts, key=lambda part: part.size, reverse=True)
        of = ", ".join(map(_part, [p for p in largest if not (p.on_host and setting.on_gpu)][:4]))
        yield f"  {kind:9}  {_size(size)} {where} ({of})"
        if memory:
            yield f"             {_verdict(setting, kind, memory)}"
    if setting.on_gpu or setting.ranks > 1:
        yield f"  machine    {_of_machine(setting)}"
    disk = [part for part in disk_per_task(setting) if part.size]
    yield f"  disk       per task {', '.join(map(_part, disk))}"


def _of_machine(setting: Setting) -> str:
    parts = main_memory(setting)
    workers = f"{setting.ranks} workers on it" if setting.ranks > 1 else "the worker"
    largest = sorted(parts, key=lambda part: part.size, reverse=True)[:4]
    size = _size(total(parts, on_gpu=False))
    of = ", ".join(map(_part, largest))
    return f"{size} of main memory, beyond Python's own, for {workers} ({of})"


def _part(part: Part) -> str:
    return f"{part.name} {_size(part.size)}"


def _size(size: float) -> str:
    """Bytes as a text, in MB below 0.1 GB."""
    return f"{size / _GB:.2f} GB" if size >= 0.1 * _GB else f"{size / _MB:.1f} MB"


def _verdict(setting: Setting, kind: str, memory: int) -> str:
    """Whether a kind of stage fits, and what to change if not."""
    usable = f"{USABLE:.0%} of {memory / _GB:.4g} GB"
    if fits(setting, kind, memory):
        return f"fits {usable}"
    over = on_device(setting, kind) - USABLE * memory
    change = remedy(setting, kind, memory)
    advice = f"set {change}" if change else "nothing that agcl can set makes it fit"
    return f"{_size(over)} too much for {usable}: {advice}"


def _lines(needs: Needs, resources: Resources) -> list[str]:
    parts = ", ".join(f"{kind} {_duration(taken)}" for kind, taken in needs.seconds.items())
    total = _duration(sum(needs.seconds.values()))
    workers = resources.num_workers
    each = f"each of {workers} workers" if workers > 1 else "one worker"
    where = "on the GPU" if resources.gpus_per_worker else "with Python's own"
    if workers > 1 and resources.shard_model:
        each = f"a worker with the whole model; {workers} workers that share it need less each"
    return [
        f"  memory  {_size(needs.worker_bytes)} peak {where} for {each}",
        f"  disk    {_size(needs.disk_bytes)}",
        f"  time    about {total}, one session at a time ({parts})",
    ]


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
