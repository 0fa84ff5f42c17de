"""The runs of our experiment in MLflow: their tags, params, metrics and artifacts."""

import json
import logging
import os
import re
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from agcl.errors import InputError

from pipeline.config.loading import flat
from pipeline.results.files import MLFLOW_RUN
from pipeline.secrets import MASK, masked
from pipeline.storage.artifact import write_json
from pipeline.storage.storage import default_uri
from pipeline.tracking.client import (
    TELEMETRY_OFF,
    Client,
    TrackingFailed,
    experiment_id,
    make_database,
)

_KEY = "agcl_key"
_NOTE = "mlflow.note.content"
_FINGERPRINT = "fingerprint"
"""Tag: of a stage's run the stage's, of a run that of its last stage, which depends on all data."""
_PARAM_LENGTH, _TAG_LENGTH = 6000, 5000
_MOST_CHILDREN = 50_000  # The server's limit for one page.
_NO_METRICS = ("step", "seconds_left")
_TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
_SLOWEST_UPLOAD = 5_000_000
"""Bytes per second that a server at least stores."""
_ENVIRONMENT = {
    # A server that is down must not hold up a run for the four minutes of MLflow's defaults.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    _TIMEOUT: "20",
    **TELEMETRY_OFF,
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",  # We report failures ourselves, in one line.
}
Content = bytes | str | Path
"""Bytes, text, or a file to copy."""


class Child(NamedTuple):
    """A stage's run below the run it belongs to."""

    run_id: str
    fingerprint: str
    is_finished: bool


def _texts(params: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Nested params as MLflow has them: dotted keys, and text of limited length."""
    return ((key, str(value)[:_PARAM_LENGTH]) for key, value in flat(params))


class Tracker:
    """The runs of our experiment. Only the driver writes them, always by explicit run id."""

    def __init__(self, storage: Path, uri: str | None, experiment: str = "agcl") -> None:
        """Connect; `uri` None is the storage folder's own database. Raises `TrackingFailed`.

        Raises `InputError` for a URI whose credentials were masked.
        """
        for key, value in _ENVIRONMENT.items():
            os.environ.setdefault(key, value)
        logging.getLogger("alembic").setLevel(logging.ERROR)
        logging.getLogger("urllib3").setLevel(logging.ERROR)  # It logs every retry.
        self.uri = uri or default_uri(storage)
        if MASK in self.uri:
            raise InputError("tracking.uri: its credentials were never written; give them again")
        if uri is None:
            make_database(storage, experiment)
        self.client: Any = Client(self.uri)
        self.experiment = experiment_id(self.client, self.uri, storage, experiment)
        self._finished: dict[str, tuple[float, str | None]] = {}
        """End in seconds since 1970 and parent of the runs that were finished when reopened and
        have no new child since."""

    def start(
        self, name: str, tags: Mapping[str, str], parent_id: str | None, at: float | None = None
    ) -> str:
        """Create a run and return its id. `at` is its start in seconds since 1970; None is now."""
        nested = {"mlflow.parentRunId": parent_id} if parent_id else {}
        ancestor = parent_id
        while ancestor in self._finished:
            ancestor = self._finished.pop(ancestor)[1]
        started = _milliseconds(at)
        run = self.client.create_run(self.experiment, started, {**tags, **nested}, name)
        return str(run.info.run_id)

    def open(
        self,
        folder: Path,
        name: str,
        tags: Mapping[str, str],
        parent_id: str | None = None,
        params: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        """The id of the run that `mlflow.json` in a folder names, reopened, or of a new run.

        A run whose params differ from `params` is another one: its settings could not be changed.
        So is one whose tag `fingerprint` differs: other data under the same name. A run of an
        earlier version without that tag gets it.
        The file holds a key before the run exists. If the process is killed in between, the next
        one finds the run by its key instead of creating a second one.
        """
        file, uri = folder / MLFLOW_RUN, masked(self.uri)
        run_id = self._known(file, uri, tags, parent_id, params)
        if run_id is None:
            key = uuid.uuid4().hex
            write_json(file, {"key": key, "uri": uri})
            run_id = self.start(name, {**tags, _KEY: key}, parent_id)
        write_json(file, {"run_id": run_id, "uri": uri})
        return run_id

    def _known(
        self,
        file: Path,
        uri: str,
        tags: Mapping[str, str],
        parent_id: str | None,
        params: Mapping[str, Any],
    ) -> str | None:
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
            run = self.client.get_run(run_id)
            info, now = run.info, dict(_texts(params))
            if info.experiment_id != self.experiment:
                return None
            if not self._is_of(run, now, tags):
                self._close(run_id)
                return None
            self.client.update_run(run_id, status="RUNNING")
            if _FINGERPRINT in tags:
                self.client.set_tag(run_id, _FINGERPRINT, tags[_FINGERPRINT])
        except TrackingFailed as error:
            if error.no_answer:
                raise
            return None  # Deleted, or the database is a new one.
        if info.status == "FINISHED" and info.end_time:
            self._finished[run_id] = (info.end_time / 1000, parent_id)
        return run_id

    def _is_of(self, run: Any, params: Mapping[str, str], tags: Mapping[str, str]) -> bool:
        """Whether a run has this fingerprint and these params, or none yet.

        It may have more params of other sections.
        """
        if run.data.tags.get(_FINGERPRINT, tags.get(_FINGERPRINT)) != tags.get(_FINGERPRINT):
            return False
        sections = {key.partition(".")[0] for key in params}
        logged = run.data.params.items()
        return all(params.get(k) == v for k, v in logged if k.partition(".")[0] in sections)

    def _close(self, run_id: str) -> None:
        """End a run that was killed and will not be resumed, and its children."""
        for each in (*(child.run_id for child in self.children(run_id)), run_id):
            if self.client.get_run(each).info.status == "RUNNING":
                self.client.set_terminated(each, "KILLED")

    def children(self, parent_id: str) -> list[Child]:
        """The stage runs below a run."""
        found = self.client.search_runs(
            [self.experiment],
            f"tags.`mlflow.parentRunId` = '{parent_id}' and tags.kind = 'stage'",
            max_results=_MOST_CHILDREN,
        )
        return [
            Child(r.info.run_id, r.data.tags.get(_FINGERPRINT, ""), r.info.status == "FINISHED")
            for r in found
        ]

    def tags(self, run_id: str, values: Mapping[str, str], note: str = "") -> None:
        """Set tags; `note` is the run's description, in Markdown."""
        for key, value in {**values, **({_NOTE: note} if note else {})}.items():
            self.client.set_tag(run_id, key, value[:_TAG_LENGTH])

    def params(self, run_id: str, values: Mapping[str, Any]) -> None:
        """Log nested values as dotted params. MLflow's params cannot change: existing ones stay."""
        from mlflow.entities import Param

        existing = self.client.get_run(run_id).data.params
        params = [Param(k, text) for k, text in _texts(values) if k not in existing]
        self.client.log_batch(run_id, params=params)

    def metrics(
        self, run_id: str, records: Iterable[Mapping[str, Any]], at: float | None = None
    ) -> None:
        """Log the numbers of records by `step`. Keys `of_...` are totals for progress bars.

        `at` is the time of measurement in seconds since 1970; None is now. A point that is logged
        again with the same time is not duplicated.
        """
        from mlflow.entities import Metric

        timestamp = _milliseconds(time.time() if at is None else at)
        metrics = [
            Metric(allowed_name(key), float(value), timestamp, record.get("step", 0))
            for record in records
            for key, value in record.items()
            if key not in _NO_METRICS
            and not key.startswith("of_")
            and isinstance(value, int | float)
        ]
        self.client.log_batch(run_id, metrics=metrics)

    def dataset(self, run_id: str, name: str, digest: str, source: str) -> None:
        """Record an input dataset."""
        from mlflow.entities import Dataset, DatasetInput

        entry = Dataset(name=name, digest=digest, source_type="local", source=source)
        self.client.log_inputs(run_id, datasets=[DatasetInput(entry)])

    def artifacts(self, run_id: str, files: Mapping[str, Content]) -> None:
        """Log contents by artifact path."""
        with tempfile.TemporaryDirectory() as scratch:
            for path, content in files.items():
                file = Path(scratch) / path
                file.parent.mkdir(parents=True, exist_ok=True)
                if isinstance(content, Path):
                    file.symlink_to(content.resolve())  # MLflow copies what it points to.
                else:
                    file.write_bytes(content if isinstance(content, bytes) else content.encode())
            with time_to_upload(Path(scratch)):
                self.client.log_artifacts(run_id, scratch)

    def end(
        self, run_id: str, status: str = "FINISHED", error: str = "", at: float | None = None
    ) -> None:
        """Close a run as FINISHED, FAILED or KILLED. `at` is its end.

        None is now or, for a run that was finished before and to which nothing was added, the end
        that it has.
        """
        if at is None and status == "FINISHED" and run_id in self._finished:
            at = self._finished[run_id][0]
        if error:
            self.client.set_tag(run_id, "error", masked(error))
        self.client.set_terminated(run_id, status, end_time=_milliseconds(at))


@contextmanager
def time_to_upload(folder: Path) -> Iterator[None]:
    """Let a request last as long as storing the largest file of a folder may take.

    A server answers once it has passed a file on to where it keeps artifacts, such as a bucket.
    """
    largest = max((f.stat().st_size for f in folder.rglob("*") if f.is_file()), default=0)
    before = os.environ[_TIMEOUT]  # MLflow reads it at every request.
    if before.isdecimal():  # Anything else is for MLflow to refuse.
        os.environ[_TIMEOUT] = str(max(int(before), largest // _SLOWEST_UPLOAD))
    try:
        yield
    finally:
        os.environ[_TIMEOUT] = before


def allowed_name(key: str) -> str:
    """A name as MLflow allows it."""
    return re.sub(r"[^\w\-. /]", "_", key)


def _milliseconds(at: float | None) -> int | None:
    return None if at is None else int(at * 1000)
