"""Passes what happens in a run on to MLflow while it happens."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from pipeline.dag import Work
from pipeline.plan import Plan
from pipeline.stages.context import LOG_FILE, Record
from pipeline.stages.evaluate import SCORES
from pipeline.stages.prepare import SUMMARY
from pipeline.stages.train import IMPORTANCE_FILE
from pipeline.tracking import Tracker

_LARGEST_COPY = 256 * 2**20


class Recorder:
    """The MLflow side of one run: its parent run and one child a stage."""

    def __init__(
        self,
        tracker: Tracker,
        folder: Path,
        plan: Plan,
        works: Mapping[str, Work],
        *,
        name: str,
        tags: Mapping[str, str],
        params: Mapping[str, Any],
        group: str | None = None,
    ) -> None:
        """Continue the run's MLflow run if its folder knows one, else start it."""
        self.tracker, self.plan, self.works, self.folder = tracker, plan, works, folder
        self.parent = tracker.resume(folder) or tracker.start(name, tags, group)
        tracker.remember(folder, self.parent)
        tracker.params(self.parent, params)
        tracker.artifacts(self.parent, {"config.yaml": folder / "config.yaml"})
        self.known = tracker.children(self.parent)
        self.open: dict[str, str] = {}
        self.logged: set[str] = set()

    def reuse(self) -> None:
        """Record every stage that is complete and not yet known as reused."""
        for stage, work in self.works.items():
            if work.fingerprint not in self.known and work.is_complete():
                child = self._start(stage, {"reused": "true"})
                lines = (work.folder / LOG_FILE).read_text(encoding="utf-8").splitlines()
                self.tracker.metrics(child, [json.loads(line) for line in lines])
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

    def finish(self, results: Mapping[str, Any], files: Mapping[str, bytes | str | Path]) -> None:
        """Log final metrics and artifacts and close the parent run."""
        numbers = {k: v for k, v in results.items() if isinstance(v, float)}
        numbers["forgetting"] = results["forgetting"]["mean"]
        last = len(results["tasks"])
        self.tracker.metrics(self.parent, [{"step": last, **numbers}])
        self.tracker.artifacts(self.parent, files)
        self.tracker.end(self.parent)

    def abort(self, status: str, error: str) -> None:
        """Close what is open as FAILED or KILLED."""
        for child in self.open.values():
            self.tracker.end(child, status)
        self.tracker.end(self.parent, status, error)

    def _start(self, stage: str, tags: Mapping[str, str]) -> str:
        work = self.works[stage]
        kind, _, task = stage.partition("/")
        known = self.known.get(work.fingerprint)
        child = known or self.tracker.start(
            stage,
            {
                "kind": "stage",
                "stage": kind,
                "task": task,
                "fingerprint": work.fingerprint,
                **tags,
            },
            self.parent,
        )
        self.known[work.fingerprint] = self.open[stage] = child
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
            self._log_importance(stage, work.folder / IMPORTANCE_FILE)
        elif kind == "prepare":
            self.tracker.dataset(
                self.parent, stage, work.fingerprint[:32], str(work.folder / SUMMARY)
            )
        child = self.open.pop(stage, None)
        if child is not None:
            self.tracker.end(child)

    def _log_scores(self, stage: str, work: Work) -> None:
        """The row of the accuracy matrix, on the parent with the task index as step."""
        index = int(stage.partition("/")[2].partition("-")[0])
        scores = json.loads((work.folder / SCORES).read_text(encoding="utf-8"))
        row: dict[str, float] = {
            f"{name}/{task}": score for task, sets in scores.items() for name, score in sets.items()
        }
        for name in next(iter(scores.values())):
            seen = [scores[task][name] for task in self.plan.tasks[: max(index, 1)]]
            row[f"{name}/average_of_seen_tasks"] = fmean(seen)
        self.tracker.metrics(self.parent, [{"step": index, **row}])

    def _log_importance(self, stage: str, file: Path) -> None:
        """A copy of the importance file, or where it lies if it is large."""
        place = f"importance/{stage.partition('/')[2]}"
        small = file.stat().st_size <= _LARGEST_COPY
        self.tracker.artifacts(
            self.parent,
            {f"{place}/{IMPORTANCE_FILE}": file} if small else {f"{place}/location.txt": str(file)},
        )
