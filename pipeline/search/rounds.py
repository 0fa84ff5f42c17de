"""Which points a search tries: chosen by Optuna a round at a time, and handed to Ray Tune.

A round's points depend on the results of all earlier rounds and on nothing else, so neither the
cluster's size, nor which trial ends first, nor an interruption changes what is tried.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import optuna
from agcl.errors import InputError
from ray.tune.search import Searcher

from pipeline.execution.failures import LESS_MEMORY
from pipeline.search.space import distributions, own_point, settings_of
from pipeline.search.trial import Trial

if TYPE_CHECKING:
    from pipeline.search.search import Search

Observe = Callable[[Trial], None]
"""Takes a trial whenever its record changes."""
LOST_WORKERS = 2
"""Times that a trial is started again because its process or its workers died."""


class Rounds(Searcher):
    """Chooses points a round at a time and remembers what came of them."""

    def __init__(self, search: "Search", side_by_side: int, observe: Observe) -> None:
        """Points of earlier runs of the search come again, and are not computed again."""
        super().__init__()
        self.search, self.side_by_side, self.observe = search, side_by_side, observe
        self.study = _study(search)
        self.asked: list[optuna.trial.Trial] = []
        self.known: list[Trial] = []
        """All trials so far, by number."""
        self.numbers: dict[str, int] = {}
        """Of the trials that Tune runs, by its id."""
        self.told = 0

    def waits(self) -> bool:
        """Whether there is a trial to run."""
        return self._next() is not None

    def all(self) -> list[Trial]:
        """The trials in order."""
        return list(self.known)

    def suggest(self, trial_id: str) -> Any:
        """The number of the next trial to run; None while a round has to be waited for."""
        if len(self.numbers) >= self.side_by_side:
            return None
        trial = self._next()
        if trial is None:
            return Searcher.FINISHED if len(self.known) == self.search.num_trials else None
        self.numbers[trial_id] = trial.number
        self._record(trial)
        return {"number": trial.number}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """The trial has finished one more task."""
        self._read(self.numbers[trial_id])

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """The trial is at its end, was stopped, or its process died too often."""
        number = self.numbers.pop(trial_id)
        trial = self._read(number)
        if trial.state != "running":
            return
        num_tasks = len(self.search.run_of(trial).plan.tasks)
        if error:
            times = f"{LOST_WORKERS + 1} times"
            why = f"its workers were lost {times}; if they ran out of memory, {LESS_MEMORY}"
            trial = replace(trial, state="failed", reason=why)
        else:
            finished = len(trial.progress) == num_tasks
            trial = replace(trial, state="finished" if finished else "stopped")
        self._record(trial)

    def _next(self) -> Trial | None:
        """The next trial to start, if there is one before the end of the round."""
        while True:
            started = set(self.numbers.values())
            for trial in self.known[self.told :]:
                if trial.state == "running" and trial.number not in started:
                    return trial
            if any(trial.state == "running" for trial in self.known[self.told :]):
                return None
            self._tell()
            if len(self.known) == self.search.num_trials:
                return None
            self._ask()

    def _ask(self) -> None:
        """Choose the points of the next round."""
        first = len(self.known)
        last = min(first + self.search.config.search.round, self.search.num_trials)
        for number in range(first, last):
            asked = self.study.ask(distributions(self.search.space))
            self.asked.append(asked)
            settings = settings_of(self.search.space, asked.params)
            before = self.search.load(number)
            if before and before.settings == settings and before.state in ("finished", "stopped"):
                self.known.append(before)
                self.observe(before)
                continue
            trial = Trial(number, settings)
            self.known.append(trial)
            try:
                self.search.run_of(trial)
            except InputError as error:
                self._record(replace(trial, state="failed", reason=str(error)))

    def _tell(self) -> None:
        """Tell Optuna, in order, what came of a round."""
        for trial in self.known[self.told :]:
            asked, last = self.asked[trial.number], trial.last
            if trial.state == "finished" and last is not None:
                by_sides = self.search.config.search.objective == "retained_and_learned"
                values = [last.retained or 0.0, last.learned] if by_sides else [last.average]
                self.study.tell(asked, values)
            elif trial.state == "stopped":
                if len(self.study.directions) == 1:
                    for step, progress in enumerate(trial.progress, start=1):
                        asked.report(progress.average, step)
                self.study.tell(asked, state=optuna.trial.TrialState.PRUNED)
            else:
                self.study.tell(asked, state=optuna.trial.TrialState.FAIL)
        self.told = len(self.known)

    def _read(self, number: int) -> Trial:
        """What the trial's process recorded last."""
        self.known[number] = self.search.load(number) or self.known[number]
        self.observe(self.known[number])
        return self.known[number]

    def _record(self, trial: Trial) -> None:
        self.search.save(trial)
        self.known[trial.number] = trial
        self.observe(trial)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the trials' own records are what a search goes on from."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, see `save`."""

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune keeps a copy for `Tuner.restore`, which is not used.


def _study(search: "Search") -> optuna.Study:
    section, seed = search.config.search, search.config.seed
    sampler: optuna.samplers.BaseSampler = (
        optuna.samplers.RandomSampler(seed=seed)
        if section.searcher == "random"
        else optuna.samplers.TPESampler(seed=seed, n_startup_trials=section.round)
    )
    sides = 2 if section.objective == "retained_and_learned" else 1
    study = optuna.create_study(sampler=sampler, directions=["maximize"] * sides)
    own = own_point(search.config, search.space)
    if own is not None:
        study.enqueue_trial(own)
    return study
