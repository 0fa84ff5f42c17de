"""`agcl ui`: the MLflow UI on loopback."""

import argparse
from functools import partial

from pipeline.tracking.ui import serve


def main(arguments: argparse.Namespace, command: str) -> int:
    """Serve until interrupted."""
    show = partial(print, "MLflow UI  ", flush=True)
    return serve(arguments.storage.expanduser().absolute(), arguments.port, show)
