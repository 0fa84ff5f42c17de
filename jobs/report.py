"""`agcl report`: write a finished run's report again."""

import argparse


def main(arguments: argparse.Namespace, command: str) -> int:
    """Rewrite `report.html` of one run, or of all runs of a comparison."""
    from pipeline.run import rewrite_report

    print(rewrite_report(arguments.run_dir, command))
    return 0
