"""`agcl plan`: the stages of a config, which of them are done, and what the others need."""

import argparse

import torch
from rich.console import Console
from rich.markup import escape

from agcl.model.models import num_weights
from pipeline.config import loading
from pipeline.config.config import Resources
from pipeline.config.usual import unusual
from pipeline.estimate import Needs, estimate
from pipeline.run import open_run
from pipeline.tracking.sync import warn


def main(arguments: argparse.Namespace, command: str) -> None:
    """Print one line per stage and an estimate for the unfinished ones."""
    run = open_run(loading.load(arguments.config, arguments.settings))
    console = Console(highlight=False, soft_wrap=True)
    width = max(len(stage.name) for stage in run.plan.stages)
    num_done = 0
    for stage in run.plan.stages:
        work = run.resolved[stage.name]
        done = work.is_complete()
        num_done += done
        state = "[green]done  [/]" if done else "to run"
        place = f"[dim]{escape(work.place)}[/]"
        console.print(f"  {state}  {escape(f'{stage.name:{width}}')}  {place}")
    console.print(f"{num_done} of {len(run.plan.stages)} stages are done")
    if not run.config.model.is_builtin:
        for line in unusual(run.config, num_weights(run.config.model.folder)):
            warn(console, line)
    if num_done == len(run.plan.stages) or not arguments.probe:
        return
    gpu = run.config.resources.gpus_per_worker
    if gpu and not torch.cuda.is_available():
        console.print("no estimate: resources.gpus_per_worker is set, but this machine has no GPU")
        return
    console.print("[dim]running a few rows of each task ...[/]")
    needs = estimate(run, "cuda" if gpu else "cpu")
    for line in _lines(needs, run.config.resources):
        console.print(line)


def _lines(needs: Needs, resources: Resources) -> list[str]:
    parts = ", ".join(f"{kind} {_duration(taken)}" for kind, taken in needs.seconds.items())
    total = _duration(sum(needs.seconds.values()))
    workers = resources.num_workers
    each = f"each of {workers} workers" if workers > 1 else "one worker"
    if workers > 1 and resources.shard_model:
        each = f"a worker with the whole model; {workers} workers that share it need less each"
    passing = f", plus {needs.checkpoint_bytes / 1e9:.2f} GB for a checkpoint while training"
    return [
        f"  memory  {needs.worker_bytes / 1e9:.1f} GB peak for {each}",
        f"  disk    {needs.disk_bytes / 1e9:.2f} GB" + passing * bool(needs.checkpoint_bytes),
        f"  time    about {total}, one session at a time ({parts})",
    ]


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
