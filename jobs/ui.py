"""`agcl ui`: the MLflow UI on loopback."""

import argparse
import sys
from functools import partial

from pipeline.tracking.ui import serve


def main(arguments: argparse.Namespace, command: str) -> int:
    """Serve until interrupted."""
    show = partial(print, "MLflow UI  ", flush=True)
    log = partial(print, file=sys.stderr, flush=True)
    storage = arguments.storage.expanduser().absolute()
    return serve(storage, arguments.port, show, log, verbose=arguments.verbose)
