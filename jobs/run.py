"""`agcl run`: one method over one sequence of tasks."""

import argparse


def main(arguments: argparse.Namespace, command: str) -> int:
    """Run and print the matrix and the metrics."""
    from jobs.execution import execute_runs
    from pipeline.config import loading
    from pipeline.run import open_run

    config = loading.load(arguments.config, arguments.settings)
    run = open_run(config)
    return execute_runs({config.method: run}, run.folder, config.name, command)
