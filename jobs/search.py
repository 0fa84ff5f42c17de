"""`agcl search`: Search one method's settings with Ray Tune and Optuna."""

import argparse

from rich.console import Console
from rich.markup import escape

from jobs.output import places_beside, print_base, print_matrices, print_metrics
from jobs.trials import TrialTable, settings_that_fit, trial_table, value_text
from pipeline.config import loading
from pipeline.config.search import Choice, Dimension
from pipeline.config.weights import slow_here
from pipeline.errors import Failed
from pipeline.execution.progress import warn
from pipeline.results.files import BEST_CONFIG, REPORT_FILE, TRIALS_FILE
from pipeline.search.search import execute_search, keeps_base, open_search
from pipeline.search.space import own_point
from pipeline.search.trial import unbounded, undecided, why_none


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
    console.print(trial_table(found.trials, settings_that_fit(console.width), found.best))
    if found.best is None or found.result is None:
        raise Failed(why_none(found.trials))
    settings = " ".join(f"{key}={value_text(v)}" for key, v in found.best.settings.items())
    console.print(f"best is trial {found.best.number}: {settings}", soft_wrap=True, markup=False)
    if keeps_base(search) and (warning := unbounded(found.trials)):
        warn(console, warning)
    if warning := undecided(found.trials):
        warn(console, warning)
    console.print("scored once, on rows that no choice depended on:")
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
        return f"one of {', '.join(map(value_text, dimension.values))}"
    return f"{value_text(dimension.low)} to {value_text(dimension.high)}, {dimension.type}"
