"""`agcl plan`: the stages of a config and what is done already."""

import argparse


def main(arguments: argparse.Namespace, command: str) -> int:
    """Print one line a stage; run nothing."""
    from rich.console import Console
    from rich.table import Table

    from pipeline import config as configs
    from pipeline.dag import Stage
    from pipeline.run import open_run

    run = open_run(configs.load(arguments.config, arguments.settings))
    table = Table("stage", "state", "inputs", "artifact")
    for stage in run.plan.stages:
        work = run.works[stage.name]
        table.add_row(
            stage.name,
            "done" if work.is_complete() else "to run",
            ", ".join(
                source.name if isinstance(source, Stage) else str(source.path)
                for source in stage.inputs.values()
            ),
            work.folder.name,
        )
    Console().print(table)
    return 0
