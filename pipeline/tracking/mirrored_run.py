"""What MLflow shows of one run: a run of its own, with one child per stage."""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Literal

from pipeline.config.naming import method_name
from pipeline.plan.plan import Run
from pipeline.plan.stage import ResolvedStage, complete
from pipeline.results.files import CONFIG_FILE, LOCATION, MODEL
from pipeline.results.run_folder import FREE
from pipeline.stages.context import Record
from pipeline.stages.files import IMPORTANCE_FILE, LOG_FILE, SUMMARY
from pipeline.tracking.registry import Scored, register
from pipeline.tracking.scores import scores_of, task_index, times
from pipeline.tracking.tracker import Content, Tracker

_LARGEST_COPY = 256 * 2**20
_MODEL_NAME = re.compile(r"[/:.%\"']+")
"""Characters that MLflow refuses in the name of a LoggedModel."""


class MirroredRun:
    """A run, and what MLflow has of it: its own run, with one child per stage."""

    def __init__(self, run: Run, name: str, kind: str, without: Collection[str]) -> None:
        self.run, self.name, self.kind = run, name, kind
        # Equal stages share an artifact, and have one child.
        self.stages = {r.folder.name: s for s, r in run.resolved.items() if s not in without}
        self.resolved = {stage: run.resolved[stage] for stage in self.stages.values()}
        self.complete: set[str] = set()
        self._find_complete()
        self.reused = frozenset(self.complete)
        self.ending: Callable[[], None] | None = None
        """`end`, with what the run is to be closed with."""
        self.registered = ""
        """`NAME/VERSION` of its model in MLflow, once it is there."""
        self.tracker: Tracker
        self.forget()

    def forget(self) -> None:
        """After a failure MLflow may lack what it was sent: ask it again what it has."""
        self.id = ""
        """Id of its MLflow run; empty while that is not open."""
        self.children: defaultdict[str, list[str]] = defaultdict(list)
        """Run ids by stage, the last one in use; several if an answer of MLflow was lost."""
        self.state: dict[str, Literal["live", "late", "recorded"]] = {}
        """By stage: `live` if its child run is open, `late` if that lacks the first records,
        `recorded` if it is complete and finished. Absent if there is no child, or it failed."""

    def _find_complete(self) -> None:
        unknown = (
            resolved for stage, resolved in self.resolved.items() if stage not in self.complete
        )
        self.complete |= {self.stages[folder.name] for folder in complete(unknown)}

    def sync(self, tracker: Tracker, parent_id: str | None) -> bool:
        """Record what MLflow does not know; True if that includes the run's end."""
        if not self.id:
            self._open(tracker, parent_id)
        self._find_complete()
        # After the run's end nothing is live any more, whether its last record came or not.
        known = {"recorded"} if self.ending else {"recorded", "live"}
        for stage in self.resolved:
            if stage in self.complete and self.state.get(stage) not in known:
                self._record(stage)
        if self.ending:
            self.ending()
        return self.ending is not None

    def observe(self, records: Sequence[Record]) -> None:
        """Show stages that run, and finish or fail their children when they do."""
        by_stage = sorted(records, key=lambda record: str(record["artifact"]))  # Keeps the order.
        for (artifact, is_state), group in groupby(
            by_stage, lambda record: (str(record["artifact"]), "state" in record)
        ):
            stage = self.stages.get(artifact)
            if stage and is_state:
                for record in group:
                    self._change(stage, record)
            elif stage and self.state.get(stage) != "recorded":
                if stage not in self.state:  # MLflow was down when it started.
                    self._start(stage, "late")
                self._log(stage, group)

    def _change(self, stage: str, record: Record) -> None:
        now, state = record["state"], self.state.get(stage)
        if now == "finished":
            self.complete.add(stage)
        if now == "started":
            self._start(stage, "live")
        elif now == "finished" and state == "live":
            self._finish(stage)
        elif now == "finished" and state != "recorded":
            self._record(stage)
        elif now != "finished" and state in ("live", "late"):
            self.tracker.end(self.children[stage][-1], "FAILED", str(record["error"]))
            del self.state[stage]

    def _open(self, tracker: Tracker, parent_id: str | None) -> None:
        config, folder = self.run.config, self.run.folder
        tags = {"kind": self.kind, "method": method_name(config), "seed": str(config.seed)}
        # Of edited data, whose params are the same: MLflow and the registry would keep the old.
        tags["fingerprint"] = list(self.run.resolved.values())[-1].fingerprint
        self.tracker = tracker
        fixed = config.model_dump(mode="json", exclude=FREE["run"])
        run_id = self.tracker.open(folder, self.name, tags, parent_id, fixed)
        self.tracker.params(run_id, config.model_dump(mode="json"))
        self.tracker.artifacts(run_id, {CONFIG_FILE: folder / CONFIG_FILE})
        stages = {resolved.fingerprint: stage for stage, resolved in self.resolved.items()}
        for child in self.tracker.children(run_id):
            if stage := stages.get(child.fingerprint):
                self.children[stage].append(child.run_id)
                if child.is_finished:
                    self.state[stage] = "recorded"
        self.id = run_id

    def _start(self, stage: str, state: Literal["live", "late"], at: float | None = None) -> None:
        """A new child for a stage, replacing earlier ones."""
        self.state.pop(stage, None)
        for old in self.children.pop(stage, []):
            self.tracker.client.delete_run(old)
        kind, _, task = stage.partition("/")
        resolved = self.resolved[stage]
        tags = {"kind": "stage", "stage": kind, "task": task, "fingerprint": resolved.fingerprint}
        if stage in self.reused:
            tags["reused"] = "true"
        child = self.tracker.start(stage, tags, self.id, at)
        self.children[stage].append(child)
        self.tracker.params(child, resolved.config)
        self.state[stage] = state

    def _record(self, stage: str) -> None:
        """Record a complete stage from its artifact, with the artifact's times."""
        resolved = self.resolved[stage]
        started, ended = times(resolved)
        self._start(stage, "late", started)
        lines = (resolved.read(LOG_FILE) or b"").splitlines()
        self._log(stage, map(json.loads, lines), ended)
        self._finish(stage, ended)

    def _log(self, stage: str, records: Iterable[Record], at: float | None = None) -> None:
        """Log metrics; scores by the run's tasks, so that one chart can show run and stages."""
        step = {"step": task_index(stage)} if stage.startswith("evaluate/") else {}
        child = self.children[stage][-1]
        self.tracker.metrics(child, [{**record, **step} for record in records], at)

    def _finish(self, stage: str, at: float | None = None) -> None:
        """Log what a stage made on the run, and finish the stage's child."""
        resolved, (kind, _, task) = self.resolved[stage], stage.partition("/")
        if kind == "evaluate":
            scores = scores_of(self.run, resolved, task_index(stage))
            self.tracker.metrics(self.id, [scores], times(resolved)[1])
        elif kind == "attribute":
            self.tracker.artifacts(self.id, _importance(resolved, f"importance/{task}"))
        elif kind == "prepare":
            source = f"{resolved.place}/{SUMMARY}"
            self.tracker.dataset(self.id, stage, resolved.fingerprint[:32], source)
        self.tracker.end(self.children[stage][-1], at=at)
        self.state[stage] = "recorded"

    def _models(self) -> Iterator[Scored]:
        """The models after each task, or after all at once, with their scores."""
        for stage, resolved in self.resolved.items():
            step = task_index(stage) if stage.startswith("evaluate/") else 0
            if step:
                model = resolved.inputs.get("adapter", resolved.inputs["model"])
                scores = scores_of(self.run, resolved, step)
                scores.pop("step")
                name = _MODEL_NAME.sub("-", stage.partition("/")[2])
                yield Scored(name, step, scores, times(resolved)[1], resolved.storage.place(model))

    def end(
        self,
        metrics: Mapping[str, float],
        files: Mapping[str, Content],
        status: str,
        error: str,
        note: str,
    ) -> None:
        """Log last metrics and files by artifact path, register the model, and close the run."""
        self.tracker.tags(self.id, {}, note)
        made = [resolved for stage, resolved in self.resolved.items() if stage in self.complete]
        self.tracker.metrics(self.id, [metrics], times(made[-1])[1] if made else None)
        self.tracker.artifacts(self.id, files)
        name, model = self.run.config.tracking.register_model, self.run.folder / MODEL
        if name and model.is_dir():
            of_base = self.run.config.model
            base = self.run.resolved["pretrain"].folder if of_base.is_builtin else of_base.folder
            self.registered = register(
                self.tracker, self.id, name, model, base, list(self._models())
            )
        self.tracker.end(self.id, status, error)

    def abort(self, status: str, error: str) -> None:
        """Close what is open as FAILED or KILLED."""
        if self.id:
            for stage, state in self.state.items():
                if state != "recorded":
                    self.tracker.end(self.children[stage][-1], status)
            self.tracker.end(self.id, status, error)


def _importance(resolved: ResolvedStage, path: str) -> Mapping[str, Content]:
    """The importance file, or its location if it is large or not on this machine."""
    file = resolved.folder / IMPORTANCE_FILE
    if file.exists() and file.stat().st_size <= _LARGEST_COPY:
        return {f"{path}/{IMPORTANCE_FILE}": file}
    return {f"{path}/{LOCATION}": f"{resolved.place}/{IMPORTANCE_FILE}"}
