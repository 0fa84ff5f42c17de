"""`agcl search`: Ray Tune over the scaling of the importances, or any other settings."""

import argparse
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from jobs.execution import places_beside, print_base, print_matrices, print_metrics
from jobs.tables import number, table
from pipeline.config import loading
from pipeline.config.search import Choice, Dimension
from pipeline.config.weights import slow_here
from pipeline.errors import Failed
from pipeline.execution.progress import duration
from pipeline.results.run_folder import TRIALS_FILE
from pipeline.run import REPORT_FILE
from pipeline.search.engine import Observe
from pipeline.search.search import BEST_CONFIG, execute_search, keeps_base, open_search, why_none
from pipeline.search.space import own_point
from pipeline.search.trial import Trial, best, unbounded, undecided
from pipeline.tracking.sync import warn

_COLOURS = {"running": "cyan", "finished": "green", "stopped": "yellow", "failed": "red"}
_TITLES = {"learned": "learning\naccuracy", "base_kept": "base\nkept"}
_WIDTH, _WIDTH_OF_SETTING = 64, 13
"""Characters of the table without settings, and of each setting; the file has those left out."""
_ROWS = 24
"""Trials that the live table shows, the latest ones."""


def main(arguments: argparse.Namespace, command: str) -> None:
    """Search; print the trials, the best one and its results on the test rows."""
    console = Console(highlight=False)
    config = loading.load(arguments.config, arguments.settings)
    search = open_search(config, arguments.trials, resume=arguments.resume)
    console.print(f"[bold]{search.folder.name}[/]: {search.num_trials} trials of {config.method}")
    for key, dimension in search.space.items():
        console.print(f"  {escape(key)}  [dim]{escape(_described(dimension))}[/]")
    if slow := slow_here(search.config):
        warn(console, slow)
    share = search.config.evaluation.validation
    console.print(f"  compared on validation rows: a share of {share} (evaluation.validation)")
    if own_point(search.config, search.space) is None:
        console.print("  the config itself is outside this space, so it is not among the trials")
    watch = TrialTable(console, search.num_trials, keep_base=keeps_base(search))
    found = execute_search(search, command=command, console=console, watch=watch)
    fitting = max(0, (console.width - _WIDTH) // _WIDTH_OF_SETTING)
    console.print(trial_table(found.trials, fitting, found.best))
    if found.best is None or found.result is None:
        raise Failed(why_none(found.trials))
    settings = " ".join(f"{key}={_value(v)}" for key, v in found.best.settings.items())
    console.print(f"best is trial {found.best.number}: {settings}", soft_wrap=True, markup=False)
    if keeps_base(search) and (warning := unbounded(found.trials)):
        warn(console, warning)
    if warning := undecided(found.trials):
        warn(console, warning)
    console.print("scored once, on test rows that no choice depended on:")
    print_matrices(console, "best", found.result)
    print_base(console, "best", found.result)
    print_metrics(console, {"best": found.result})
    for name, file in (
        ("config", BEST_CONFIG),
        ("report", REPORT_FILE),
        ("trials", TRIALS_FILE),
    ):
        console.print(f"{name:11} {search.folder / file}", soft_wrap=True, markup=False)
    for line in places_beside(config, search.folder):
        console.print(line, soft_wrap=True, markup=False)


def _described(dimension: Dimension) -> str:
    if isinstance(dimension, Choice):
        return f"one of {', '.join(map(_value, dimension.values))}"
    return f"{_value(dimension.low)} to {_value(dimension.high)}, {dimension.type}"


class TrialTable:
    """The running trials: a live table on a terminal, elsewhere one line per change."""

    def __init__(self, console: Console, num_trials: int, *, keep_base: bool = False) -> None:
        self.console, self.num_trials, self.keep_base = console, num_trials, keep_base
        self.trials: dict[int, Trial] = {}
        self.began = time.monotonic()
        self.live = Live(
            console=console, get_renderable=self._render, transient=True, refresh_per_second=2
        )

    def __enter__(self) -> Observe:
        self.began = time.monotonic()
        if self.console.is_terminal:
            self.live.start()
        return self._observe

    def __exit__(self, *error: object) -> None:
        self.live.stop()

    def _observe(self, trial: Trial) -> None:
        before = self.trials.get(trial.number)
        self.trials[trial.number] = trial
        if not self.console.is_terminal and trial != before:
            self._say(trial)

    def _say(self, trial: Trial) -> None:
        name = f"{trial.number} {trial.settings.get('method', '')}".strip()
        scores, last = "", trial.last
        if last:
            scores = f"average {last.average:.3f} learning accuracy {last.learned:.3f} "
            scores += f"retained {number(last.retained)}"
            scores += "" if last.base_kept is None else f" base kept {last.base_kept:.3f}"
        reason = f" ({escape(trial.reason)})" if trial.reason else ""
        self.console.print(
            f"  trial {name} {trial.state} task {len(trial.progress)} {scores}{reason}"
            f" [dim]{self._outlook()}[/]",
            soft_wrap=True,
        )

    def _render(self) -> Group:
        shown = sorted(self.trials.values(), key=lambda trial: trial.number)[-_ROWS:]
        tuning = any("method" in trial.settings for trial in shown)
        return Group(trial_table(shown, int(tuning), self._best()), self._outlook())

    def _best(self) -> Trial | None:
        return best(list(self.trials.values()), keep_base=self.keep_base)

    def _outlook(self) -> str:
        """How many trials are done, the best so far, and the time left."""
        done = sum(trial.state != "running" for trial in self.trials.values())
        parts = [f"{done}/{self.num_trials} done"]
        so_far = self._best()
        if so_far and so_far.last:
            parts.append(f"best {so_far.last.average:.3f} (trial {so_far.number})")
        if done:
            left = (time.monotonic() - self.began) / done * (self.num_trials - done)
            parts.append(f"about {duration(left)} left")
        return ", ".join(parts)


def trial_table(trials: Sequence[Trial], num_settings: int, winner: Trial | None = None) -> Table:
    """One line per trial, with its first `num_settings` settings; `winner` stands out."""
    keys = list(dict.fromkeys(k for t in trials for k in t.settings))[:num_settings]
    names = [key.rpartition(".")[2] for key in keys]
    scores = ["average", "learned", "retained", "base_kept"]
    if all(trial.last is None or trial.last.base_kept is None for trial in trials):
        scores.remove("base_kept")
    titles = [_TITLES.get(each, each) for each in scores]
    shown = table(("trial", "state"), ("task", *titles, *names))
    for trial in trials:
        last = trial.last
        numbers = [getattr(last, each) if last else None for each in scores]
        shown.add_row(
            f"{trial.number}{' *' if trial == winner else ''}",
            f"[{_COLOURS[trial.state]}]{trial.state}[/]",
            str(len(trial.progress)),
            *map(number, numbers),
            *(_value(trial.settings.get(key)) for key in keys),
            style="bold" if trial == winner else None,
        )
    return shown


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "null" if value is None else str(value)
