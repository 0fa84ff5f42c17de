"""Client of MLflow, with one kind of error, and the database of a storage folder.

Besides it, only `tracker`, `registry` and `flavor` import mlflow.
"""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from agcl.errors import InputError, one_line

from pipeline.config.resources import is_server
from pipeline.secrets import masked
from pipeline.storage.artifact import claimed
from pipeline.storage.storage import DATABASE

KIND = "custom_model_development"  # Makes the UI open in its training view.
KIND_TAG = "mlflow.experimentKind"
TELEMETRY_OFF = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}


class TrackingFailed(Exception):
    """MLflow could not be read or written."""

    def __init__(self, message: str, *, no_answer: bool) -> None:
        """`no_answer`: the server could not be reached, so a later attempt may succeed."""
        super().__init__(message)
        self.no_answer = no_answer


class Client:
    """`MlflowClient` whose every exception becomes a `TrackingFailed` with a one-line message."""

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
            except Exception as error:  # Stores leak the errors of their database or transport.
                # Transport errors are OSErrors; a malformed address is a ValueError as well.
                cause = error.__cause__ or error.__context__
                no_answer = isinstance(cause, OSError) and not isinstance(cause, ValueError)
                reason = "no answer" if no_answer else masked(one_line(error))[:200]
                if "database is locked" in str(error):  # Sqlite, by another process.
                    no_answer, reason = True, "another process keeps its database locked"
                raise TrackingFailed(
                    f"cannot use MLflow at {masked(self._uri)} ({reason})", no_answer=no_answer
                ) from error

        return guarded


def make_database(storage: Path, experiment: str) -> None:
    """Create the storage folder's database under another name, then rename it.

    MLflow's migrations take seconds. A process killed during them, or two processes running them
    at once, would leave a database that cannot be opened.
    """
    file = storage / DATABASE
    with nullcontext() if file.exists() else claimed(file):
        if not file.exists():
            aside = file.with_name(file.name + ".part")
            aside.unlink(missing_ok=True)
            uri = f"sqlite:///{aside}"
            experiment_id(Client(uri), uri, storage, experiment)
            aside.replace(file)


def experiment_id(client: Any, uri: str, storage: Path, name: str) -> str:
    """The id of an experiment, created if necessary."""
    found = client.get_experiment_by_name(name)
    if found is None:
        # Artifacts of a local database belong beside it; a server decides for itself.
        location = None if is_server(uri) else (storage / "mlartifacts").as_uri()
        try:
            tags = {KIND_TAG: KIND}
            return str(client.create_experiment(name, artifact_location=location, tags=tags))
        except TrackingFailed:
            found = client.get_experiment_by_name(name)  # Another process was faster.
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":  # It is found by its name all the same.
        raise InputError(
            f"tracking.experiment: {name!r} was deleted in MLflow; restore it there or choose "
            "another name"
        )
    return str(found.experiment_id)
