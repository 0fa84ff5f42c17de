"""Tables of trials in the terminal, while they run and afterwards."""

import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from jobs.tables import number, table
from pipeline.execution.progress import duration
from pipeline.search.engine import Observe
from pipeline.search.trial import Trial, best

_COLOURS = {"running": "cyan", "finished": "green", "stopped": "yellow", "failed": "red"}
_TITLES = {"learned": "learning\naccuracy", "base_kept": "base\nkept"}
_WIDTH, _WIDTH_OF_SETTING = 64, 13
"""Characters of the table without settings, and of each setting; the file has those left out."""
_ROWS = 24
"""Trials that the live table shows, the latest ones."""


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
        said, last = [f"  trial {name} {trial.state}"], trial.last
        if last:
            said += [f"task {len(trial.progress)}", f"average {last.average:.3f}"]
            said += [f"learning accuracy {last.learned:.3f}", f"retained {number(last.retained)}"]
            said += [] if last.base_kept is None else [f"base kept {last.base_kept:.3f}"]
        reason = f" ({escape(trial.reason)})" if trial.reason else ""
        line = f"{', '.join(said)}{reason} [dim]{self._outlook()}[/]"
        self.console.print(line, soft_wrap=True)

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


def settings_that_fit(width: int) -> int:
    """The number of settings that a table of trials has room for."""
    return max(0, (width - _WIDTH) // _WIDTH_OF_SETTING)


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
            *(value_text(trial.settings.get(key)) for key in keys),
            style="bold" if trial == winner else None,
        )
    return shown


def value_text(value: Any) -> str:
    """A setting's value as it is shown."""
    return f"{value:.4g}" if isinstance(value, float) else "null" if value is None else str(value)
