"""Ray Tune over a config's settings: every trial is a run of the same DAG.

What no setting changes is computed once, before; only validation rows are scored. `rounds.py` says
which points are tried.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from ray import tune
from ray.tune.progress_reporter import TrialProgressCallback

from pipeline.config.config import Config, Resources
from pipeline.config.loading import changed
from pipeline.config.search import Dimension
from pipeline.config.search import Search as SearchSection
from pipeline.execution.cluster import needs
from pipeline.execution.scheduler import run_sessions
from pipeline.execution.session import run_stages
from pipeline.plan.plan import Run, plan
from pipeline.plan.schedule import Session, needed_for, sessions
from pipeline.plan.stage import Stage, resolve
from pipeline.search import trial as trials
from pipeline.search.rounds import LOST_WORKERS, Observe, Rounds
from pipeline.search.space import corners
from pipeline.search.trial import Trial
from pipeline.stages.context import Context
from pipeline.stages.evaluate import evaluate
from pipeline.stages.files import SCORES
from pipeline.storage import artifact


@dataclass(frozen=True)
class Search:
    """A search to run: what is tried, how often, and where it is recorded."""

    config: Config
    """Of the trials, that is with only validation rows scored."""
    space: Mapping[str, Dimension]
    num_trials: int
    folder: Path

    def folder_of(self, number: int) -> Path:
        """Where a trial is recorded."""
        return self.folder / "trials" / str(number)

    def load(self, number: int) -> Trial | None:
        """What is recorded of a trial; None where it was not begun."""
        # Another node may have written it.
        self.config.storage.refresh(self.folder_of(number) / trials.RECORD)
        return trials.load(self.folder_of(number))

    def save(self, trial: Trial) -> None:
        """Record a trial, whole or not at all."""
        trial.save(self.folder_of(trial.number))
        self.config.storage.save_results(self.folder_of(trial.number))

    def run_of(self, trial: Trial) -> Run:
        """The trial as a run of the DAG. Raises `InputError` where its settings do not agree."""
        config = changed(self.config, trial.settings).model_copy(
            update={"name": f"{self.config.name}-trial{trial.number}", "search": SearchSection()}
        )
        planned = plan(config)
        # Neither the report nor the last task's importance is looked at.
        stages = needed_for([s for s in planned.stages if s.fn is evaluate], planned.stages)
        planned = replace(planned, stages=stages)
        works = resolve(stages, config.storage)
        return Run(config, self.folder_of(trial.number), planned, works)


def shared_stages(search: Search) -> list[Stage]:
    """The stages that are the same for every point of the space, in dependency order."""
    one, other = (search.run_of(Trial(0, settings)) for settings in corners(search.space))
    folders = {work.folder for work in other.resolved.values()}
    return [stage for stage in one.plan.stages if one.resolved[stage.name].folder in folders]


def run_trials(search: Search, side_by_side: int, observe: Observe) -> list[Trial]:
    """Run what is missing of the trials, at most so many at once, on the cluster that Ray is on.

    Gives all of them in order. A trial that failed before is tried again.
    """
    rounds = Rounds(search, side_by_side, observe)
    if rounds.waits():
        scratch = search.folder / ".ray-tune"
        # Tune would end quietly on an interrupt; the command's own handling is for all commands.
        os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
        os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
        os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
        try:
            tune.Tuner(
                tune.with_resources(_trainable(search), _resources(search.config.resources)),
                tune_config=tune.TuneConfig(
                    search_alg=rounds,
                    num_samples=search.num_trials,
                    scheduler=_scheduler(search),
                    reuse_actors=True,
                ),
                run_config=tune.RunConfig(
                    name="tune",
                    storage_path=str(scratch),
                    failure_config=tune.FailureConfig(max_failures=LOST_WORKERS),
                    verbose=0,
                    callbacks=[_Silence()],
                ),
            ).fit()
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return rounds.all()


class _Silence(TrialProgressCallback):
    """In place of Tune's own report on every trial that ends, which even `verbose=0` leaves."""

    def log_result(self, *args: Any, **kwargs: Any) -> None:
        """Say nothing."""

    def on_trial_complete(self, *args: Any, **kwargs: Any) -> None:
        """Say nothing."""


def _scheduler(search: Search) -> tune.schedulers.TrialScheduler | None:
    by: dict[str, Any] = {"time_attr": "task", "metric": "average", "mode": "max"}
    num_tasks = len(plan(search.config).tasks)
    match search.config.search.stopping:
        case "asha":
            # One more than there are: a trial at its last task ends by itself.
            return tune.schedulers.ASHAScheduler(
                **by, grace_period=1, max_t=num_tasks + 1, reduction_factor=2
            )
        case "median":
            return tune.schedulers.MedianStoppingRule(**by, grace_period=1, min_samples_required=3)
    return None


def _resources(resources: Resources) -> Any:
    """What a trial holds: with one worker it computes itself, else its workers do."""
    if resources.num_workers > 1:
        # On the head, which no spot market takes away, and nothing that its workers need.
        return tune.PlacementGroupFactory([{"CPU": 0, "node:__internal_head__": 0.001}])
    return tune.PlacementGroupFactory([needs(resources)])


def _trainable(search: Search) -> Callable[[dict[str, Any]], None]:
    def trial(config: dict[str, Any]) -> None:
        run_trial(search, config["number"])

    return trial


def run_trial(search: Search, number: int) -> None:
    """Run a trial's unfinished stages, in a process of Tune's; report and record every task.

    A stage that fails ends the trial as failed; lost workers raise, and Tune starts it again.
    """
    folder = search.folder_of(number)
    recorded = search.load(number)
    assert recorded is not None, folder
    trial = Trial(number, recorded.settings)
    run = search.run_of(trial)
    shared = {stage.name for stage in shared_stages(search)}

    def catch_up() -> None:
        """Report every task that is finished by now."""
        nonlocal trial
        while (progress := _progress(run, len(trial.progress) + 1)) is not None:
            seconds = _seconds(run, without=shared)
            trial = replace(trial, progress=(*trial.progress, progress), seconds=seconds)
            search.save(trial)
            tune.report({"task": len(trial.progress), "average": progress.average})

    catch_up()
    failed = _run_stages(run, folder / ".ray-train", catch_up)
    if failed:
        trial = replace(trial, state="failed", reason=f"stage {failed[0]}: {failed[1]}")
        artifact.write_text(folder / "error.log", failed[2])
    else:
        trial = replace(trial, state="finished")
    search.save(trial)


def _run_stages(
    run: Run, scratch: Path, catch_up: Callable[[], None]
) -> tuple[str, str, str] | None:
    """Run what is missing; stage, reason and traceback of a failure."""
    failed: dict[str, tuple[str, str, str]] = {}
    names = {work.folder.name: stage for stage, work in run.resolved.items()}

    def observe(records: Sequence[Mapping[str, Any]]) -> None:
        for record in records:
            stage = names[str(record["artifact"])]
            if record.get("state") == "failed":
                failed.setdefault("first", (stage, str(record["error"]), str(record["traceback"])))
            elif record.get("state") == "finished" and stage.startswith("evaluate/"):
                catch_up()

    resources = run.config.resources
    if resources.num_workers > 1:
        todo: list[Session] = sessions({run.config.name: run.plan.stages}, run.config.storage)
        lost = run_sessions(todo, scratch, resources, 1, observe)
        if lost and not failed:
            raise lost[0]
        return failed.get("first")
    torch.set_num_threads(resources.cpus_per_worker)
    device = torch.device("cuda" if resources.gpus_per_worker else "cpu")
    try:
        context = Context(device, checkpoint_minutes=resources.checkpoint_minutes)
        run_stages(list(run.resolved.values()), context, observe)
    except Exception:
        if not failed:  # Else the stage's failure was recorded before it was raised.
            raise
    return failed.get("first")


def _progress(run: Run, number: int) -> trials.Progress | None:
    """How the run stands after that task; None where it is not there yet."""
    tasks = run.plan.tasks
    if number > len(tasks):
        return None
    names = ["evaluate/0-base", *(f"evaluate/{i}-{t}" for i, t in enumerate(tasks, start=1))]
    works = [run.resolved[name] for name in names[: number + 1]]
    if not works[-1].is_complete():
        return None
    scores = [json.loads(work.read(SCORES) or b"") for work in works]
    return trials.progress_after(scores, tasks)


def _seconds(run: Run, without: set[str]) -> float:
    """Time that the run's own finished stages took."""
    own = [work for name, work in run.resolved.items() if name not in without]
    found = [work.manifest() for work in own if work.is_complete()]
    return round(sum(float(manifest["seconds"]) for manifest in found if manifest), 3)
