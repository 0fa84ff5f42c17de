"""MLflow: one parent run a sequence, one child a stage. The only file that imports mlflow."""

import json
import logging
import os
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from agcl.errors import InputError

from pipeline.secrets import MASK, masked
from pipeline.storage.artifact import claimed, write_json

EXPERIMENT = "agcl"
_RUN_FILE, _KEY = "mlflow.json", "agcl_key"
_KIND = "custom_model_development"  # The UI then opens in its training view.
_PARAM_LENGTH = 6000
_DATABASE = "mlflow.db"
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
"""A server that is down must not hold up a run for the four minutes that MLflow would try."""
Content = bytes | str | Path
"""Bytes, text, or a file to copy."""


def default_uri(storage: Path) -> str:
    """The sqlite file in the storage folder."""
    return f"sqlite:///{storage / _DATABASE}"


class TrackingFailed(Exception):
    """MLflow could not be read or written."""

    def __init__(self, message: str, *, no_answer: bool) -> None:
        """`no_answer`: the server did not answer, so that another time it may."""
        super().__init__(message)
        self.no_answer = no_answer


class _Client:
    """MLflow's client; whatever a call of it raises becomes `TrackingFailed` of one line."""

    def __init__(self, uri: str) -> None:
        from mlflow import MlflowClient

        self._uri = uri
        self._client = self._guarded(MlflowClient)(tracking_uri=uri)

    def __getattr__(self, name: str) -> Any:
        return self._guarded(getattr(self._client, name))

    def _guarded(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            try:
                return call(*args, **kwargs)
            except Exception as error:  # A store raises what its database or transport raises.
                # Transport errors are OSErrors; of them, a malformed address is a ValueError too.
                transport = error.__cause__ or error.__context__
                no_answer = isinstance(transport, OSError) and not isinstance(transport, ValueError)
                reason = "no answer" if no_answer else masked(" ".join(str(error).split()))[:200]
                raise TrackingFailed(
                    f"cannot use MLflow at {masked(self._uri)} ({reason})", no_answer=no_answer
                ) from error

        return guarded


class Tracker:
    """Runs of one experiment, written by the driver alone and always by explicit run id."""

    def __init__(self, storage: Path, uri: str | None) -> None:
        """Connect. Raises `InputError` for a bad URI, `TrackingFailed` for a silent server."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "CRITICAL")  # We say what failed, in a line.
        for key, value in _PATIENCE.items():
            os.environ.setdefault(key, value)
        logging.getLogger("alembic").setLevel(logging.ERROR)
        logging.getLogger("urllib3").setLevel(logging.ERROR)  # It would tell every retry.
        self.uri = uri or default_uri(storage)
        if MASK in self.uri:
            raise InputError("tracking.uri: its credentials were never written; give them again")
        try:
            if uri is None:
                _make_database(storage)
            self.client: Any = _Client(self.uri)
            self.experiment = _experiment(self.client, self.uri, storage)
        except TrackingFailed as error:
            if error.no_answer:
                raise
            raise InputError(f"tracking.uri: {error}") from None

    def start(self, name: str, tags: Mapping[str, str], parent: str | None = None) -> str:
        """Create a run and return its id."""
        nested = {"mlflow.parentRunId": parent} if parent else {}
        run = self.client.create_run(self.experiment, run_name=name, tags={**tags, **nested})
        return str(run.info.run_id)

    def open(
        self, folder: Path, name: str, tags: Mapping[str, str], parent: str | None = None
    ) -> str:
        """The id of the run that a folder knows, running again, or of a new one that it will know.

        The folder holds a new run's key before there is the run, so that one whose process was
        killed in between is found and not made twice.
        """
        file, uri = folder / _RUN_FILE, masked(self.uri)
        run_id = self._known(file, uri)
        if run_id is None:
            key = uuid.uuid4().hex
            write_json(file, {"key": key, "uri": uri})
            run_id = self.start(name, {**tags, _KEY: key}, parent)
        write_json(file, {"run_id": run_id, "uri": uri})
        return run_id

    def _known(self, file: Path, uri: str) -> str | None:
        try:
            known = json.loads(file.read_text(encoding="utf-8"))
            if known["uri"] != uri:
                return None
            if "run_id" not in known:
                key = uuid.UUID(known["key"]).hex
                found = self.client.search_runs([self.experiment], f"tags.{_KEY} = '{key}'")
                return str(found[0].info.run_id) if found else None
            run_id = str(known["run_id"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        try:
            self.client.update_run(run_id, status="RUNNING")
        except TrackingFailed as error:
            if error.no_answer:
                raise
            return None
        return run_id

    def discard(self, run_id: str) -> None:
        """Delete a run that is begun anew, so that nothing of it is there twice."""
        self.client.delete_run(run_id)

    def children(self, parent: str) -> dict[str, tuple[str, bool]]:
        """Of a run's stage runs, by fingerprint: the id, and whether it is finished."""
        found: dict[str, tuple[str, bool]] = {}
        token = None
        while True:
            page = self.client.search_runs(
                [self.experiment],
                filter_string=f"tags.`mlflow.parentRunId` = '{parent}' and tags.kind = 'stage'",
                page_token=token,
            )
            for run in page:
                key = run.data.tags.get("fingerprint", "")
                found[key] = (run.info.run_id, run.info.status == "FINISHED")
            token = page.token
            if not token:
                return found

    def params(self, run_id: str, values: Mapping[str, Any]) -> None:
        """Log nested values as dotted params; those already there stay."""
        from mlflow.entities import Param

        params = [Param(k, str(v)[:_PARAM_LENGTH]) for k, v in _flat(values)]
        there = self.client.get_run(run_id).data.params
        new = [param for param in params if param.key not in there]
        for start in range(0, len(new), 100):
            self.client.log_batch(run_id, params=new[start : start + 100])

    def metrics(
        self, run_id: str, records: Iterable[Mapping[str, Any]], at: float | None = None
    ) -> None:
        """Log the numbers of records, each with its `step`; `of_...` only serve progress bars.

        `at` is when they were measured, in seconds since 1970; None is now. Logging a number again
        with the same time changes nothing.
        """
        from mlflow.entities import Metric

        now = int((time.time() if at is None else at) * 1000)
        metrics = [
            Metric(re.sub(r"[^\w\-. /]", "_", key), float(value), now, int(record.get("step", 0)))
            for record in records
            for key, value in record.items()
            if key != "step" and not key.startswith("of_") and isinstance(value, int | float)
        ]
        for start in range(0, len(metrics), 1000):
            self.client.log_batch(run_id, metrics=metrics[start : start + 1000])

    def dataset(self, run_id: str, name: str, digest: str, source: str) -> None:
        """Record an input dataset."""
        from mlflow.entities import Dataset, DatasetInput

        entry = Dataset(name=name, digest=digest, source_type="local", source=source)
        self.client.log_inputs(run_id, datasets=[DatasetInput(entry)])

    def artifacts(self, run_id: str, files: Mapping[str, Content]) -> None:
        """Log bytes, text or existing files under the given artifact paths."""
        for path, content in files.items():
            folder, _, name = path.rpartition("/")
            if isinstance(content, Path):
                self.client.log_artifact(run_id, str(content), folder or None)
            else:
                self._log_content(run_id, folder, name, content)

    def _log_content(self, run_id: str, folder: str, name: str, content: bytes | str) -> None:
        import tempfile

        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / name
            file.write_bytes(content if isinstance(content, bytes) else content.encode())
            self.client.log_artifact(run_id, str(file), folder or None)

    def register(self, run_id: str, name: str, folder: Path) -> None:
        """Register the model in a folder as the next version of `name`; once a run."""
        if "registered_version" in self.client.get_run(run_id).data.tags:
            return
        model = self.client.create_logged_model(self.experiment, name, source_run_id=run_id)
        self.client.log_model_artifacts(model.model_id, str(folder))
        self.client.finalize_logged_model(model.model_id, "READY")
        known = self.client.search_registered_models(f"name = '{name}'")
        if not known:
            self.client.create_registered_model(name)
        version = self.client.create_model_version(
            name, source=model.artifact_location, run_id=run_id, model_id=model.model_id
        )
        self.client.set_tag(run_id, "registered_version", f"{name}/{version.version}")

    def end(self, run_id: str, status: str = "FINISHED", error: str = "") -> None:
        """Close a run as FINISHED, FAILED or KILLED."""
        if error:
            self.client.set_tag(run_id, "error", masked(error))
        self.client.set_terminated(run_id, status)


def _make_database(storage: Path) -> None:
    """Make the storage folder's database, if there is none, aside and renamed.

    Its first migrations take seconds: a process that is killed in them, or two at a time, would
    leave a database that no one can open.
    """
    file = storage / _DATABASE
    with nullcontext() if file.exists() else claimed(file):
        if not file.exists():
            aside = file.with_name(file.name + ".part")
            aside.unlink(missing_ok=True)
            uri = f"sqlite:///{aside}"
            _experiment(_Client(uri), uri, storage)
            aside.replace(file)


def _experiment(client: Any, uri: str, storage: Path) -> str:
    """The id of our experiment, which is made if there is none."""
    found = client.get_experiment_by_name(EXPERIMENT)
    if found is None:
        # Artifacts of a local database belong beside it; a server decides for itself.
        on_server = uri.startswith(("http:", "https:", "databricks"))
        location = None if on_server else (storage / "mlartifacts").as_uri()
        try:
            tags = {"mlflow.experimentKind": _KIND}
            return str(client.create_experiment(EXPERIMENT, artifact_location=location, tags=tags))
        except TrackingFailed:
            found = client.get_experiment_by_name(EXPERIMENT)  # Another run was faster.
            if found is None:
                raise
    return str(found.experiment_id)


def _flat(values: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    items = (
        values.items()
        if isinstance(values, Mapping)
        else enumerate(values)
        if isinstance(values, list | tuple)
        else ()
    )
    for key, value in items:
        if isinstance(value, Mapping | list | tuple) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def serve(storage: Path, port: int) -> int:
    """Run the MLflow UI of a storage folder on loopback until interrupted; its exit code."""
    if not (storage / _DATABASE).is_file():
        raise InputError(f"--storage: no MLflow database in {storage}")
    arguments = ["--backend-store-uri", default_uri(storage), "--host", "127.0.0.1"]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            *arguments,
            "--port",
            str(port),
            "--workers",
            "1",
        ],
        env=environment,
        check=False,
    ).returncode
