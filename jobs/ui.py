"""`agcl ui`: the MLflow UI on loopback."""

import argparse


def main(arguments: argparse.Namespace, command: str) -> int:
    """Serve until interrupted."""
    from pipeline.tracking.client import serve

    return serve(arguments.storage.expanduser().absolute(), arguments.port)
