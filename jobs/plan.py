"""`agcl plan`: the stages of a config and what is done already."""

import argparse


def main(arguments: argparse.Namespace, command: str) -> int:
    """Print one line a stage; run nothing."""
    from rich.console import Console

    from pipeline import loading
    from pipeline.run import open_run

    run = open_run(loading.load(arguments.config, arguments.settings))
    console = Console(highlight=False, soft_wrap=True)
    width = max(len(stage.name) for stage in run.plan.stages)
    num_done = 0
    for stage in run.plan.stages:
        work = run.works[stage.name]
        done = work.is_complete()
        num_done += done
        state = "[green]done  [/]" if done else "to run"
        console.print(f"  {state}  {stage.name:{width}}  [dim]{work.folder}[/]")
    console.print(f"{num_done} of {len(run.plan.stages)} stages are done")
    return 0
