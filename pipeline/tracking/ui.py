"""`agcl ui`: MLflow's own UI of a storage folder, opened where our runs are."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from agcl.errors import InputError

from pipeline.results.results import METRIC_TITLES, metric_name
from pipeline.tracking.client import (
    DATABASE,
    KIND,
    KIND_TAG,
    TELEMETRY_OFF,
    Client,
    TrackingFailed,
    default_uri,
)

_VIEW_TAG = "mlflow.sharedViewState.agcl"
_VIEW = "workflowType=machine_learning&viewStateShareKey=agcl"


def serve(storage: Path, port: int, show: Callable[[str], None]) -> int:
    """Run the MLflow UI of a storage folder on loopback until interrupted; return its exit code.

    Calls `show` with the address of each of our experiments. Raises `InputError` if there is no
    database.
    """
    if not (storage / DATABASE).is_file():
        raise InputError(f"--storage: no MLflow database in {storage}")
    with suppress(TrackingFailed):  # Then the server says why.
        for experiment in _view(storage):
            show(f"http://127.0.0.1:{port}/#/experiments/{experiment}/runs?{_VIEW}")
    arguments = f"--host 127.0.0.1 --port {port} --workers 1 --backend-store-uri".split()
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", *arguments, default_uri(storage)],
        env={
            **TELEMETRY_OFF,
            **os.environ,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        },
        start_new_session=True,  # Its own workers are then ended with it.
    )
    try:
        return server.wait()
    except KeyboardInterrupt:
        return 130
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        server.wait()


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
