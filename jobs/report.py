"""`agcl report`: write a finished run's report again."""

import argparse

from pipeline.results.report import rewrite_report


def main(arguments: argparse.Namespace, command: str) -> None:
    """Rewrite `report.html` of one run, of a comparison's runs, or of a search's best run."""
    print(rewrite_report(arguments.run_dir))
