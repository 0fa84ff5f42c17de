"""Models in MLflow: one LoggedModel per task with its scores, the last one registered."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from agcl.errors import one_line

from pipeline.secrets import masked
from pipeline.tracking.client import TrackingFailed
from pipeline.tracking.flavor import write_flavor
from pipeline.tracking.tracker import Tracker, allowed_name, time_to_upload

_MOST_MODELS = 1000


class Scored(NamedTuple):
    """A run's model after a task."""

    name: str
    """Unique within the run."""
    step: int
    """Number of tasks trained so far."""
    scores: Mapping[str, float]
    at: float
    """When it was scored, in seconds since 1970."""
    place: str
    """Path or URI of its artifact."""


def register(
    tracker: Tracker, run_id: str, name: str, folder: Path, base: Path, tasks: Sequence[Scored]
) -> str:
    """Register the model in a folder as the next version of `name`, once per run and name.

    Returns `NAME/VERSION`.

    Every model of `tasks` becomes a LoggedModel with its scores. The last one is that in the
    folder, whose files are copied, with MLflow's transformers flavor; the others name the place of
    their artifact. `base` is the folder with the base model's config. Raises `TrackingFailed`.
    """
    client = tracker.client
    known_version = str(client.get_run(run_id).data.tags.get("registered_version", ""))
    if known_version.rpartition("/")[0] == name:  # The setting may have changed since.
        return known_version
    mine = f"source_run_id = '{run_id}'"
    found = client.search_logged_models([tracker.experiment], mine, max_results=_MOST_MODELS)
    known = {model.name: model for model in found}  # Of an attempt that was interrupted.
    models = [known.get(task.name) or _logged(tracker, run_id, task) for task in tasks]
    final = models[-1]
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "model"
        try:
            write_flavor(folder, base, target, run_id=run_id, model_id=final.model_id)
        except Exception as error:  # MLflow's and transformers' errors have no common type.
            reason = masked(one_line(error))[:200]
            raise TrackingFailed(f"cannot register {name} ({reason})", no_answer=False) from error
        with time_to_upload(target):
            client.log_model_artifacts(final.model_id, str(target))
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    version = client.create_model_version(
        name, source=final.artifact_location, run_id=run_id, model_id=final.model_id
    )
    registered = f"{name}/{version.version}"
    client.set_tag(run_id, "registered_version", registered)
    return registered


def _logged(tracker: Tracker, run_id: str, task: Scored) -> Any:
    """A new LoggedModel with its scores, an output of the run."""
    from mlflow.entities import LoggedModelOutput, Metric

    client, tags = tracker.client, {"task": task.name, "artifact": task.place}
    model = client.create_logged_model(
        tracker.experiment, task.name, source_run_id=run_id, tags=tags
    )
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, task.step)])
    at = int(task.at * 1000)
    metrics = [
        Metric(allowed_name(key), value, at, task.step, model_id=model.model_id)
        for key, value in task.scores.items()
    ]
    client.log_batch(run_id, metrics=metrics)
    return client.finalize_logged_model(model.model_id, "READY")
