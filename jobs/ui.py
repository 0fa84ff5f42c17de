"""`agcl ui`: the MLflow UI on loopback."""

import argparse
import sys
from functools import partial
from pathlib import Path

from agcl.errors import InputError
from pipeline.tracking.ui import serve


def main(arguments: argparse.Namespace, command: str) -> int:
    """Serve until interrupted. Raises `InputError` if the storage is no folder with a database."""
    if "://" in arguments.storage:  # Not shown: it could hold credentials.
        raise InputError(
            "--storage: MLflow's database is never in an object store; open the server that "
            "tracking.uri or MLFLOW_TRACKING_URI names"
        )
    show = partial(print, "MLflow UI  ", flush=True)
    log = partial(print, file=sys.stderr, flush=True)
    storage = Path(arguments.storage).expanduser().absolute()
    return serve(storage, arguments.port, show, log, verbose=arguments.verbose)
