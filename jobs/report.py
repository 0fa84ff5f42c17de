"""`agcl report`: write a finished run's report again."""

import argparse
from pathlib import Path


def main(arguments: argparse.Namespace, command: str) -> int:
    """Rewrite `report.html` of one run, or of all runs of a comparison."""
    from pipeline.run import rewrite_report

    place = arguments.run_dir
    print(rewrite_report(place if "://" in place else Path(place), command))
    return 0
