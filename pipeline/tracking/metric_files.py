"""A run's metrics as plain files in its folder, beside or instead of MLflow.

`metrics.jsonl` has one line per step of a stage, and one per evaluation with the scores of all
tasks. `tensorboard/` has the same for TensorBoard: one TensorBoard run per stage, and the scores by
task index in the folder itself.
"""

import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pipeline.plan.plan import Run
from pipeline.plan.stage import ResolvedStage, complete
from pipeline.results.files import JSONL, TENSORBOARD
from pipeline.stages.context import Record
from pipeline.stages.files import LOG_FILE
from pipeline.tracking.scores import scores_of, task_index, times

Format = Literal["jsonl", "tensorboard"]
_ARE_NO_METRICS = ("artifact", "step", "seconds", "seconds_left")


class MetricFiles:
    """The metric files of one run.

    Records are appended while stages run. `rewrite` writes the files anew from the artifacts: at
    the start for what earlier commands computed, and at the end, since a stage that was resumed
    logs steps again and one that another run computed logged nothing here.
    """

    def __init__(self, run: Run, formats: Sequence[Format]) -> None:
        self.run, self.formats = run, formats
        self.stages = {resolved.folder.name: stage for stage, resolved in run.resolved.items()}
        self._writers: dict[str, Any] = {}
        """TensorBoard's, by stage."""
        self.rewrite()

    def observe(self, records: Iterable[Record]) -> None:
        """Append the metrics of running stages."""
        now = time.time()
        for record in records:
            stage = self.stages.get(str(record["artifact"]), "")
            if stage.startswith("evaluate/"):
                if record.get("state") == "finished":
                    self._append_logged(stage)
            elif stage and "step" in record:
                self._append(stage, _metrics(record), int(record["step"]), now)
        for writer in self._writers.values():
            writer.flush()

    def rewrite(self) -> None:
        """Write the files from the finished stages' artifacts."""
        self.close()
        (self.run.folder / JSONL).unlink(missing_ok=True)
        # In a bucket too: files of an earlier command, which have other names, would double curves.
        self.run.config.storage.delete_folder(self.run.folder / TENSORBOARD)
        self.run.folder.mkdir(parents=True, exist_ok=True)
        finished = {folder.name for folder in complete(self.run.resolved.values())}
        for artifact, stage in self.stages.items():
            if artifact in finished:
                self._append_logged(stage)
        self.close()

    def close(self) -> None:
        """Close the files."""
        for writer in self._writers.values():
            writer.close()
        self._writers = {}

    def _append_logged(self, stage: str) -> None:
        for metrics, step, at in _logged(self.run, stage):
            self._append(stage, metrics, step, at)

    def _append(self, stage: str, metrics: Mapping[str, float], step: int, at: float) -> None:
        if "jsonl" in self.formats:
            line = {"stage": stage, "step": step, "time": round(at, 3), **metrics}
            with (self.run.folder / JSONL).open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(line) + "\n")
        if "tensorboard" in self.formats:
            # Scores of all evaluations are one curve over the tasks.
            name = "" if stage.startswith("evaluate/") else stage
            for key, value in metrics.items():
                self._writer(name).add_scalar(key, value, step, walltime=at)

    def _writer(self, name: str) -> Any:
        from tensorboardX import SummaryWriter  # Ray Tune's own dependency.

        if name not in self._writers:
            folder: Path = self.run.folder / TENSORBOARD / name
            self._writers[name] = SummaryWriter(str(folder), write_to_disk=True)
        return self._writers[name]


def _metrics(record: Mapping[str, float | str]) -> dict[str, float]:
    """The finite numbers of a record; `of_...` are totals for progress bars."""
    return {
        key: value
        for key, value in record.items()
        if isinstance(value, int | float)
        and math.isfinite(value)
        and key not in _ARE_NO_METRICS
        and not key.startswith("of_")
    }


def _logged(run: Run, stage: str) -> Iterator[tuple[dict[str, float], int, float]]:
    """Metrics, step and time of what a finished stage logged, and an evaluation's scores."""
    resolved: ResolvedStage = run.resolved[stage]
    started, ended = times(resolved)
    if stage.startswith("evaluate/"):
        index = task_index(stage)
        yield _metrics(scores_of(run, resolved, index)), index, ended
        return
    for line in map(json.loads, (resolved.read(LOG_FILE) or b"").splitlines()):
        if metrics := _metrics(line):
            yield metrics, int(line["step"]), started + line.get("seconds", 0.0)
