"""`agcl ui`: the MLflow UI on loopback."""

import argparse

from pipeline.tracking.client import serve


def main(arguments: argparse.Namespace, command: str) -> int:
    """Serve until interrupted."""
    return serve(arguments.storage.expanduser().absolute(), arguments.port)
