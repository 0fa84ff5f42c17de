"""`agcl ui`: MLflow's own UI of a storage folder, opened where our runs are."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

from agcl.errors import InputError

from pipeline.results.results import METRIC_TITLES, metric_name
from pipeline.storage.storage import DATABASE, default_uri
from pipeline.tracking.client import KIND, KIND_TAG, TELEMETRY_OFF, Client, TrackingFailed

_VIEW_TAG = "mlflow.sharedViewState.agcl"
_VIEW = "workflowType=machine_learning&viewStateShareKey=agcl"
_NOISE = re.compile(r"\bINFO\b|^\[MLflow\] Security|^Registry store URI|Warning: |^  from ")
"""Lines of a server that runs well."""


def serve(
    storage: Path,
    port: int,
    show: Callable[[str], None],
    log: Callable[[str], None],
    *,
    verbose: bool = False,
) -> int:
    """Run the MLflow UI of a storage folder on loopback until interrupted; return its exit code.

    Calls `show` with the address of each of our experiments once the server listens, and `log` with
    each line that the server prints; only with those of errors, unless `verbose`. Raises
    `InputError` if there is no database, or another program listens on the port.
    """
    if not (storage / DATABASE).is_file():
        raise InputError(f"--storage: no MLflow database in {storage}")
    _check_free(port)
    log("starting MLflow; Ctrl-C stops it")
    address, pages = f"http://127.0.0.1:{port}", []
    with suppress(TrackingFailed):  # Then the server says why.
        pages = [f"{address}/#/experiments/{found}/runs?{_VIEW}" for found in _view(storage)]
    arguments = f"--host 127.0.0.1 --port {port} --workers 1 --backend-store-uri".split()
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", *arguments, default_uri(storage)],
        env={
            **TELEMETRY_OFF,
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # Its own workers are then ended with it.
    )
    assert server.stdout
    Thread(target=_show, args=(server, port, pages or [address], show), daemon=True).start()
    try:
        for line in server.stdout:
            if verbose or not _NOISE.search(line):
                log(line.rstrip("\n"))
        return server.wait()
    except KeyboardInterrupt:
        return 130
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            raise InputError(f"--port: {port}: {getattr(error, 'strerror', error)}") from None


def _show(
    server: subprocess.Popen[str], port: int, pages: Sequence[str], show: Callable[[str], None]
) -> None:
    """Show the pages as soon as the server listens."""
    while server.poll() is None:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            for page in pages:
                show(page)
            return
        time.sleep(0.2)


def _view(storage: Path) -> Iterator[str]:
    """Give our experiments a shared view of runs with their averages; yields the experiments' ids.

    Without the view, MLflow lists no metrics, and a run's many stages among the runs.
    """
    client: Any = Client(default_uri(storage))
    columns = [f"metrics.`{metric_name(key)}`" for key in METRIC_TITLES]
    for experiment in client.search_experiments(filter_string=f"tags.`{KIND_TAG}` = '{KIND}'"):
        view = {
            "searchFilter": "tags.kind != 'stage'",
            "orderByKey": "attributes.start_time",
            "orderByAsc": False,
            "selectedColumns": ["tags.`method`", "tags.`seed`", *columns],
        }
        client.set_experiment_tag(experiment.experiment_id, _VIEW_TAG, json.dumps(view))
        yield str(experiment.experiment_id)
