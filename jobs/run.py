"""`agcl run`: one method over one sequence of tasks."""

import argparse

from jobs.output import execute_runs
from pipeline.config import loading
from pipeline.config.naming import method_name
from pipeline.run import open_run


def main(arguments: argparse.Namespace, command: str) -> None:
    """Run and print the matrix and the metrics."""
    config = loading.load(arguments.config, arguments.settings)
    run = open_run(config)
    execute_runs({method_name(config): run}, run.folder, config.name, command)
