"""One run in MLflow: its parent run and one child a stage."""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from pipeline.plan.plan import Run
from pipeline.plan.stage import ResolvedStage
from pipeline.results.model_card import LOCATION, MODEL
from pipeline.stages.context import Record
from pipeline.stages.files import IMPORTANCE_FILE, LOG_FILE, SCORES, SUMMARY, TEXT
from pipeline.tracking.client import Content, Tracker

_LARGEST_COPY = 256 * 2**20


def made_at(work: ResolvedStage) -> float | None:
    """When a complete stage was finished, in seconds since 1970.

    Its numbers carry that time, so that MLflow takes them once however often they are sent.
    """
    manifest = work.manifest()
    return manifest["started"] + manifest["seconds"] if manifest else None


class RunRecorder:
    """The MLflow side of one run: its parent run and one child a stage."""

    def __init__(
        self,
        tracker: Tracker,
        name: str,
        run: Run,
        above: str | None,
        kind: str,
        without: Collection[str],
    ) -> None:
        """Continue the run's MLflow run if its folder knows one, else start it."""
        self.tracker, self.plan = tracker, run.plan
        self.works = {stage: work for stage, work in run.resolved.items() if stage not in without}
        self.folder = run.folder
        self.register_as = run.config.tracking.register_model
        tags = {"kind": kind, "method": run.config.method, "seed": str(run.config.seed)}
        self.parent = tracker.open(run.folder, name, tags, above)
        tracker.params(self.parent, run.config.model_dump(mode="json"))
        tracker.artifacts(self.parent, {"config.yaml": run.folder / "config.yaml"})
        self.known = tracker.children(self.parent)
        self.open: dict[str, str] = {}

    def catch_up(self, *, reused: bool) -> None:
        """Record every stage that is complete and that MLflow does not know as finished."""
        for stage, work in self.works.items():
            recorded = self.known.get(work.fingerprint, ("", False))[1]
            if not recorded and work.is_complete():
                child = self._start(stage, {"reused": "true"} if reused else {})
                lines = (work.read(LOG_FILE) or b"").splitlines()
                self.tracker.metrics(child, [json.loads(line) for line in lines], made_at(work))
                self._finish(stage)

    def observe(self, records: Iterable[Record]) -> None:
        """Take records of artifacts; those of other runs are left alone."""
        metrics: dict[str, list[Record]] = {}
        names = {work.folder.name: stage for stage, work in self.works.items()}
        for record in records:
            stage = names.get(str(record["artifact"]))
            if stage is None:
                continue
            match record.get("state"):
                case "started":
                    self._start(stage, {})
                case None:
                    metrics.setdefault(stage, []).append(record)
                case state:
                    self._log(metrics)
                    metrics = {}
                    if state == "finished":
                        self._finish(stage)
                    elif stage in self.open:
                        self.tracker.end(self.open.pop(stage), "FAILED", str(record["error"]))
        self._log(metrics)

    def finish(self, results: Mapping[str, Any], files: Mapping[str, Content]) -> None:
        """Log final metrics and artifacts and close the parent run."""
        numbers = {k: v for k, v in results.items() if isinstance(v, float)}
        if results["forgetting"]["mean"] is not None:
            numbers["forgetting"] = results["forgetting"]["mean"]
        last = len(results["tasks"])
        made = made_at(self.works["report"])
        self.tracker.metrics(self.parent, [{"step": last, **numbers}], made)
        self.tracker.artifacts(self.parent, files)
        if self.register_as:
            self.tracker.register(self.parent, self.register_as, self.folder / MODEL)
        self.tracker.end(self.parent)

    def abort(self, status: str, error: str) -> None:
        """Close what is open as FAILED or KILLED."""
        for child in self.open.values():
            self.tracker.end(child, status)
        self.tracker.end(self.parent, status, error)

    def _start(self, stage: str, tags: Mapping[str, str]) -> str:
        work = self.works[stage]
        kind, _, task = stage.partition("/")
        tags = {"kind": "stage", "stage": kind, "task": task, **tags}
        if work.fingerprint in self.known:
            self.tracker.discard(self.known[work.fingerprint][0])
        child = self.tracker.start(stage, {**tags, "fingerprint": work.fingerprint}, self.parent)
        self.known[work.fingerprint] = (child, False)
        self.open[stage] = child
        self.tracker.params(child, work.config)
        return child

    def _log(self, metrics: Mapping[str, Sequence[Record]]) -> None:
        for stage, records in metrics.items():
            if stage in self.open:
                self.tracker.metrics(self.open[stage], records)

    def _finish(self, stage: str) -> None:
        work = self.works[stage]
        kind = stage.partition("/")[0]
        if kind == "evaluate":
            self._log_scores(stage, work)
        elif kind == "attribute":
            self._log_importance(stage, work)
        elif kind == "prepare":
            source = f"{work.place}/{SUMMARY}"
            self.tracker.dataset(self.parent, stage, work.fingerprint[:32], source)
        child = self.open.pop(stage, None)
        if child is not None:
            self.tracker.end(child)
            self.known[work.fingerprint] = (child, True)

    def _log_scores(self, stage: str, work: ResolvedStage) -> None:
        """The row of the accuracy matrix, on the parent with the task index as step."""
        index = int(stage.partition("/")[2].partition("-")[0])
        scores = json.loads(work.read(SCORES) or b"")
        row: dict[str, float] = {
            f"{name}/{task}": score for task, sets in scores.items() for name, score in sets.items()
        }
        for name in scores[self.plan.tasks[0]]:
            if any(name not in scores[task] for task in self.plan.tasks):
                continue
            seen = [scores[task][name] for task in self.plan.tasks[: max(index, 1)]]
            row[f"{name}/average_of_seen_tasks"] = fmean(seen)
        if (text := work.read(TEXT)) is not None:
            row["text_loss"] = json.loads(text)["loss"]
        self.tracker.metrics(self.parent, [{"step": index, **row}], made_at(work))

    def _log_importance(self, stage: str, work: ResolvedStage) -> None:
        """A copy of the importance file, or where it lies if it is large or not on this machine."""
        place, file = f"importance/{stage.partition('/')[2]}", work.folder / IMPORTANCE_FILE
        copy = file.exists() and file.stat().st_size <= _LARGEST_COPY
        self.tracker.artifacts(
            self.parent,
            {f"{place}/{IMPORTANCE_FILE}": file}
            if copy
            else {f"{place}/{LOCATION}": f"{work.place}/{IMPORTANCE_FILE}"},
        )
