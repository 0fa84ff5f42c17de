"""`agcl search`: Ray Tune over the scaling of the importances, or any other settings."""

import argparse
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from pipeline.search.rounds import Observe
    from pipeline.search.trial import Trial

_COLOURS = {"running": "cyan", "finished": "green", "stopped": "yellow", "failed": "red"}
_WIDTH, _WIDTH_OF_SETTING = 54, 13
"""Columns of the table without settings, and with each; those that do not fit are in the file."""
_ROWS = 24
"""Trials that the live table shows; of more, the last ones."""


def main(arguments: argparse.Namespace, command: str) -> int:
    """Search, and print the trials, the winner and how it does on the test rows."""
    from rich.console import Console
    from rich.markup import escape

    from jobs.execution import places_beside, print_matrices, print_metrics
    from pipeline.config import loading
    from pipeline.errors import StageFailed
    from pipeline.search.search_run import BEST_CONFIG, execute_search, open_search
    from pipeline.search.space import own_point

    console = Console(highlight=False)
    config = loading.load(arguments.config, arguments.settings)
    search = open_search(config, arguments.trials, resume=arguments.resume)
    console.print(f"[bold]{search.folder.name}[/]: {search.num_trials} trials of {config.method}")
    for key, dimension in search.space.items():
        shown = {k: v for k, v in dimension.model_dump().items() if k != "type"}
        console.print(f"  {escape(key)}  [dim]{escape(f'{dimension.type} {shown}')}[/]")
    share = search.config.evaluation.validation
    console.print(f"  compared on validation rows: a share of {share} (evaluation.validation)")
    if own_point(search.config, search.space) is None:
        console.print("  the config itself is outside of this space, so it is not among the trials")
    try:
        watch = TrialTable(console, search.num_trials)
        found = execute_search(search, command=command, console=console, watch=watch)
    except StageFailed as failure:
        Console(stderr=True, soft_wrap=True).print(
            f"agcl: {failure}", markup=False, highlight=False
        )
        return 1
    fitting = max(0, (console.width - _WIDTH) // _WIDTH_OF_SETTING)
    console.print(trial_table(found.trials, fitting))
    if found.best is None or found.result is None:
        reasons = {trial.reason for trial in found.trials if trial.reason}
        Console(stderr=True, soft_wrap=True).print(
            f"agcl: no trial reached the last task ({'; '.join(sorted(reasons)) or 'all stopped'})",
            markup=False,
            highlight=False,
        )
        return 1
    settings = " ".join(f"{key}={_value(v)}" for key, v in found.best.settings.items())
    console.print(f"best is trial {found.best.number}: {settings}", soft_wrap=True, markup=False)
    console.print("scored once on the rows that nothing was chosen by:")
    print_matrices(console, "best", found.result)
    print_metrics(console, {"best": found.result})
    for name, place in (
        ("config", search.folder / BEST_CONFIG),
        ("report", search.folder / "best" / "report.html"),
        ("trials", search.folder / "trials.parquet"),
    ):
        console.print(f"{name:11} {place}", soft_wrap=True, markup=False)
    for line in places_beside(config, search.folder):
        console.print(line, soft_wrap=True, markup=False)
    return 0


class TrialTable:
    """The trials as they go: a live table, or a line a change where it is no terminal."""

    def __init__(self, console: "Console", num_trials: int) -> None:
        from rich.live import Live

        self.console, self.num_trials = console, num_trials
        self.trials: dict[int, Trial] = {}
        self.since: dict[int, float] = {}
        """When each trial that runs began."""
        self.took: list[float] = []
        """Of the trials that ended meanwhile."""
        self.first = 0.0
        self.live = Live(
            console=console, get_renderable=self._render, transient=True, refresh_per_second=2
        )

    def __enter__(self) -> "Observe":
        if self.console.is_terminal:
            self.live.start()
        return self._observe

    def __exit__(self, *error: object) -> None:
        self.live.stop()

    def _observe(self, trial: "Trial") -> None:
        before = self.trials.get(trial.number)
        self.trials[trial.number] = trial
        if before is None and trial.state == "running":
            self.since[trial.number] = time.monotonic()
            self.first = self.first or time.monotonic()
        if trial.state != "running" and trial.number in self.since:
            self.took.append(time.monotonic() - self.since.pop(trial.number))
        if not self.console.is_terminal and trial != before:
            self._say(trial)

    def _say(self, trial: "Trial") -> None:
        from rich.markup import escape

        last = trial.last
        scores = (
            f"average {last.average:.3f} retained {_number(last.retained)} learned "
            f"{last.learned:.3f}"
            if last
            else ""
        )
        reason = f" ({escape(trial.reason)})" if trial.reason else ""
        self.console.print(
            f"  trial {trial.number} {trial.state} task {len(trial.progress)} {scores}{reason}"
            f" [dim]{self._outlook()}[/]",
            soft_wrap=True,
        )

    def _render(self) -> Any:
        from rich.console import Group

        shown = sorted(self.trials.values(), key=lambda trial: trial.number)[-_ROWS:]
        return Group(trial_table(shown, 0), self._outlook())

    def _outlook(self) -> str:
        """How many are done, the best so far, and the time left."""
        from pipeline.search.trial import best

        done = sum(trial.state != "running" for trial in self.trials.values())
        parts = [f"{done}/{self.num_trials} done"]
        so_far = best(list(self.trials.values()))
        if so_far and so_far.last:
            parts.append(f"best {so_far.last.average:.3f} (trial {so_far.number})")
        if self.took:
            pace = (time.monotonic() - self.first) / len(self.took)
            minutes, seconds = divmod(round(pace * (self.num_trials - done)), 60)
            parts.append(f"about {minutes}:{seconds:02} left")
        return ", ".join(parts)


def trial_table(trials: "Sequence[Trial]", num_settings: int) -> "Table":
    """One line a trial, with its settings if there are to be so many columns of them."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from pipeline.search.trial import best

    winner = best(trials)
    keys = list(dict.fromkeys(k for t in trials for k in t.settings))[:num_settings]
    table = Table(box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for column in ("trial", "state"):
        table.add_column(column)
    for column in ("task", "retained", "learned", "average", *(_short(key) for key in keys)):
        table.add_column(column, justify="right")
    for trial in trials:
        last = trial.last
        numbers = (last.retained, last.learned, last.average) if last else (None, None, None)
        table.add_row(
            f"{trial.number}{' *' if trial is winner else ''}",
            f"[{_COLOURS[trial.state]}]{trial.state}[/]",
            str(len(trial.progress)),
            *map(_number, numbers),
            *(_value(trial.settings.get(key)) for key in keys),
            style="bold" if trial is winner else None,
        )
    return table


def _short(key: str) -> str:
    return key.rpartition(".")[2]


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "null" if value is None else str(value)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
