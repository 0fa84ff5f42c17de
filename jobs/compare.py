"""`agcl compare`: several methods and seeds over the same sequence, shared stages computed once."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.config.config import Config


def main(arguments: argparse.Namespace, command: str) -> int:
    """Tune every method if asked to, run it with every seed, print all results."""
    from agcl.errors import InputError
    from jobs.execution import execute_runs, print_failure
    from pipeline.config import loading
    from pipeline.config.presets import METHODS
    from pipeline.errors import StageFailed
    from pipeline.run import open_run
    from pipeline.search.search import VALIDATION

    methods = list(METHODS) if arguments.methods == "all" else arguments.methods.split(",")
    methods = list(dict.fromkeys(methods))
    for method in methods:
        if method not in METHODS:
            raise InputError(f"--methods: no method {method!r} (there are {', '.join(METHODS)})")
    settings = list(arguments.settings)
    first = loading.load(arguments.config, settings, method=methods[0])
    if arguments.trials > 1 and not first.evaluation.validation:
        settings.append(f"evaluation.validation={VALIDATION}")
    folder = first.storage.root / f"{first.name}-compare"

    def load(more: list[str], method: str) -> "Config":
        return loading.load(arguments.config, [*settings, *more], method=method)

    chosen: dict[str, list[str]] = {method: [] for method in methods}
    if arguments.trials > 1:
        try:
            chosen = _tune(load, methods, arguments.trials, folder / "tuning")
        except StageFailed as failure:
            return print_failure(failure)
    runs = {}
    for method in methods:
        config = load(chosen[method], method)
        for seed in range(config.seed, config.seed + arguments.seeds):
            label = method if arguments.seeds == 1 else f"{method}-seed{seed}"
            runs[label] = open_run(config.model_copy(update={"seed": seed}), folder / label)
    return execute_runs(runs, folder, folder.name, command)


def _tune(
    load: Callable[[list[str], str], "Config"], methods: Sequence[str], trials: int, folder: Path
) -> dict[str, list[str]]:
    """Run the trials of every method, print what was chosen; the settings by method."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from jobs.search import TrialTable
    from pipeline.search.tuning import execute_tuning, open_tuning

    console = Console(highlight=False)
    search = open_tuning(load, methods, trials, folder)
    console.print(f"[bold]tuning[/]: {trials} trials per method, {search.num_trials} in all")
    watch = TrialTable(console, search.num_trials)
    chosen = execute_tuning(search, console=console, watch=watch)
    for trial in watch.trials.values():
        if trial.reason:
            text = f"  failed trial {search.label(trial.number)}: {trial.reason}"
            console.print(text, style="yellow", markup=False, soft_wrap=True)
    table = Table(title="chosen on validation rows", title_justify="left", box=SIMPLE_HEAD)
    for column in ("method", "settings"):
        table.add_column(column)
    table.add_column("score", justify="right")
    for method, best in chosen.items():
        table.add_row(method, " ".join(best.settings) or "defaults", f"{best.score:.3f}")
    console.print(table)
    for edge, other in (("smallest", "smaller"), ("largest", "larger")):
        names = [method for method, best in chosen.items() if best.edge == edge]
        if names:
            console.print(
                f"The {edge} learning rate tried was the best of {', '.join(names)}: a still "
                f"{other} one may be better."
            )
    return {method: list(best.settings) for method, best in chosen.items()}
