"""The trials of a search on Ray Tune, with points from Optuna.

The points of a round depend on the results of earlier rounds and on nothing else, and every trial
is a run of the same DAG. So resuming is the same search again: it chooses the same points, and each
trial finds its finished stages in the storage.
"""

import os
import platform
import shutil
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from traceback import format_exc
from typing import Any

import optuna
from agcl.errors import InputError
from ray import tune
from ray.tune.progress_reporter import TrialProgressCallback
from ray.tune.search import ConcurrencyLimiter
from ray.tune.search.optuna import OptunaSearch

from pipeline.config import hub, loading
from pipeline.config.config import Config
from pipeline.config.resources import Resources
from pipeline.config.search import Dimension, SearchSection
from pipeline.execution.cluster import worker_resources
from pipeline.execution.failures import LESS_MEMORY
from pipeline.execution.workers import LOSSES
from pipeline.plan.plan import Run, plan
from pipeline.plan.schedule import needed_for
from pipeline.plan.stage import resolve
from pipeline.search.space import Settings, distributions, own_point
from pipeline.search.trial import Progress, Trial, run_trial
from pipeline.secrets import masked
from pipeline.stages.evaluate import evaluate
from pipeline.storage import artifact

Observe = Callable[[Trial], None]
"""Called with a trial whenever it changes."""


@dataclass(frozen=True)
class Search:
    """What to try, how many trials, and where."""

    config: Config
    """The trials' config: it scores validation rows only."""
    folder: Path
    num_trials: int
    space: Mapping[str, Dimension] = field(default_factory=dict)
    """Where Optuna chooses points, by config key."""
    known: Mapping[str, tuple[Settings, Config]] = field(default_factory=dict)
    """The trials by label, if they are all chosen beforehand."""

    def label(self, number: int) -> str:
        """What to call a trial."""
        return list(self.known)[number] if self.known else f"trial-{number}"

    def run_folder(self, number: int) -> Path:
        """The folder of a trial as a run."""
        return self.folder / "trials" / self.label(number)

    def run_of(self, number: int, settings: Mapping[str, Any]) -> Run:
        """The trial as a run of the DAG. Raises `InputError` if its settings contradict."""
        label = self.label(number)
        config = self.known[label][1] if self.known else loading.changed(self.config, settings)
        name = f"{self.config.name}-{label}"
        config = config.model_copy(update={"name": name, "search": SearchSection()})
        planned = plan(config)
        # A trial needs neither a report nor the importance of its last task.
        stages = needed_for([s for s in planned.stages if s.fn is evaluate], planned.stages)
        resolved = resolve(stages, config.storage)
        return Run(config, self.run_folder(number), replace(planned, stages=stages), resolved)


_METRICS: Mapping[str, str | list[str]] = {
    "average": "average",
    "retained_and_learned": ["retained", "learned"],
    "base_and_average": ["base_kept", "average"],
}
"""Fields of `Progress`, by the config's objective."""


class Points(OptunaSearch):
    """`OptunaSearch` that numbers its points and reports stopped trials as pruned, not as results.

    Ray's class reports the last score of a stopped trial as its result. After fewer tasks there is
    less to forget, so that score would look better than the scores of complete trials.
    """

    def __init__(self, search: Search, num_tasks: int) -> None:
        section, seed = search.config.search, search.config.seed
        own = own_point(search.config, search.space)
        metric = _METRICS[section.objective]
        super().__init__(
            distributions(search.space),
            metric=metric,
            mode="max" if isinstance(metric, str) else ["max"] * len(metric),
            points_to_evaluate=[own] if own else None,
            sampler=optuna.samplers.RandomSampler(seed=seed)
            if section.searcher == "random"
            else optuna.samplers.TPESampler(seed=seed, n_startup_trials=section.round),
        )
        self.num_tasks, self.asked = num_tasks, 0

    def suggest(self, trial_id: str) -> dict[str, Any]:
        """The next trial."""
        self.asked += 1
        return {"trial": {"number": self.asked - 1, "settings": super().suggest(trial_id)}}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Scores after one more task; a failure has none."""
        if "task" in result:
            super().on_trial_result(trial_id, result)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Only a trial with all tasks has a result; others count as pruned, or as failed."""
        last = result or {}
        whole = last if last.get("task") == self.num_tasks else None
        super().on_trial_complete(trial_id, whole, error or "reason" in last)


class Watch(TrialProgressCallback):
    """The trials as Tune runs them, in place of its own report (which `verbose=0` still prints)."""

    def __init__(self, search: Search, num_tasks: int, observe: Observe) -> None:
        self.search, self.num_tasks, self.observe = search, num_tasks, observe
        self.trials: dict[int, Trial] = {}

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """A trial starts, or starts again after its process was lost."""
        self._change(trial)

    def on_trial_result(
        self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A trial has finished one more task, or failed."""
        if "reason" in result:
            self._change(trial, state="failed", reason=result["reason"])
            folder = self.search.run_folder(self._number(trial))
            with suppress(OSError):  # A full disk must not end the other trials.
                folder.mkdir(parents=True, exist_ok=True)
                artifact.write_text(folder / "error.log", result["traceback"])
        else:
            scores = Progress(**{name: result[name] for name in Progress.__annotations__})
            before = self.trials[self._number(trial)].progress[: result["task"] - 1]
            self._change(trial, progress=(*before, scores), seconds=result["seconds"])

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """A trial has ended, or was stopped."""
        now = self.trials[self._number(trial)]
        if now.state == "running":
            whole = len(now.progress) == self.num_tasks
            self._change(trial, state="finished" if whole else "stopped")

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """The process of a trial was lost too often."""
        times = f"{LOSSES} times"
        why = f"its workers were lost {times}; if they ran out of memory, {LESS_MEMORY}"
        self._change(trial, state="failed", reason=why)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune keeps a copy for `Tuner.restore`, which is not used.

    def _number(self, trial: Any) -> int:
        return int(trial.config["trial"]["number"])

    def _change(self, trial: Any, **changes: Any) -> None:
        number = self._number(trial)
        new = Trial(number, trial.config["trial"]["settings"])
        self.trials[number] = replace(self.trials.get(number, new), **changes)
        self.observe(self.trials[number])


def run_trials(
    search: Search, shared: Collection[str], side_by_side: int, observe: Observe
) -> list[Trial]:
    """Run the trials on the cluster that Ray is connected to, as many at once as fit.

    `shared` names the artifacts that trials share. Returns the trials by number.
    """
    num_tasks = len(plan(search.config).tasks)
    watch = Watch(search, num_tasks, observe)
    known = enumerate(settings for settings, _ in search.known.values())
    listed = [{"number": number, "settings": settings} for number, settings in known]
    # Released when all points that it gave out have results. Tune asks for a whole round at once.
    rounds = (
        None
        if listed
        else ConcurrencyLimiter(
            Points(search, num_tasks), max_concurrent=search.config.search.round, batch=True
        )
    )
    scratch = search.folder / ".ray-tune"
    # Tune would end quietly on an interrupt; the command's own handling is for all commands.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"  # A failure has no scores.
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    shutil.rmtree(scratch, ignore_errors=True)  # Left by a driver that was killed.
    try:
        tune.Tuner(
            tune.with_resources(
                _trainable(search, shared), _resources(search.config.resources, side_by_side)
            ),
            param_space={"trial": tune.grid_search(listed)} if listed else None,
            tune_config=tune.TuneConfig(
                search_alg=rounds,
                num_samples=1 if listed else search.num_trials,
                scheduler=_scheduler(search, num_tasks),
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(scratch),
                failure_config=tune.FailureConfig(max_failures=LOSSES - 1),
                verbose=0,
                callbacks=[watch],
            ),
        ).fit()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return [watch.trials[number] for number in sorted(watch.trials)]


def _trainable(search: Search, shared: Collection[str]) -> Callable[[dict[str, Any]], None]:
    def trial(config: dict[str, Any]) -> None:
        model, storage = search.config.model, search.config.storage
        try:
            if storage.shared and not storage.root.is_dir():
                raise InputError(
                    f"storage: node {platform.node()} does not see {storage.root} of the driver's "
                    "node"
                )
            if model.on_hub:
                hub.on_this_machine(model.folder, weights=False)  # A plan reads its config.
            run_trial(search.run_of(**config["trial"]), shared)
        except (InputError, OSError) as error:  # Retrying would meet it again.
            reason = masked(" ".join(str(error).split()))
            tune.report({"reason": reason, "traceback": masked(format_exc())})

    return trial


def _scheduler(search: Search, num_tasks: int) -> tune.schedulers.TrialScheduler | None:
    by: dict[str, Any] = {"time_attr": "task", "metric": "average", "mode": "max"}
    match search.config.search.stopping:
        case "asha":
            # One more than there are: a trial at its last task ends by itself.
            return tune.schedulers.ASHAScheduler(
                **by, grace_period=1, max_t=num_tasks + 1, reduction_factor=2
            )
        case "median":
            return tune.schedulers.MedianStoppingRule(**by, grace_period=1, min_samples_required=3)
    return None


def _resources(resources: Resources, side_by_side: int) -> tune.PlacementGroupFactory:
    """The resources that Tune reserves for a trial.

    With one worker, the trial computes in its own process and reserves what that worker needs. With
    several, it reserves only a share of the head node, which is not a spot instance, so that no
    more trials start than their workers have room for.
    """
    if resources.num_workers > 1:
        # Not all of it: Ray Train places a helper of each trial's workers on the head too. Rounded
        # to the precision of Ray's resources.
        share = int(9_000 / side_by_side) / 10_000
        return tune.PlacementGroupFactory([{"CPU": 0, "node:__internal_head__": share}])
    return tune.PlacementGroupFactory([worker_resources(resources)])
