"""Spend every method's tuning budget and print what was chosen."""

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from agcl.errors import InputError
from pipeline.config.config import Config
from pipeline.run import execute_trials, open_run
from pipeline.search import tuning
from pipeline.storage.artifact import write_json

CHOSEN_FILE = "tuning.json"


def tune(
    load: Callable[[list[str], str], Config],
    methods: Sequence[str],
    trials: int,
    folder: Path,
    command: str,
) -> dict[str, list[str]]:
    """Run the trials of every method; the settings that each chose, and `tuning.json`.

    `load` reads the config with more settings for a method. Raises `InputError` for a method of
    which every trial failed.
    """
    console = Console()
    settings = {method: tuning.candidates(load([], method), trials) for method in methods}
    configs = {
        method: [tuning.trial(load(more, method), n) for n, more in enumerate(settings[method])]
        for method in methods
    }
    runs = {
        f"{method}-{number}": open_run(config, folder / "tuning" / f"{method}-{number}")
        for method in methods
        for number, config in enumerate(configs[method])
    }
    console.print(f"[bold]tuning[/]: {trials} trials a method, {len(runs)} in all", highlight=False)
    results = execute_trials(
        runs, folder / "tuning", title=f"{folder.name}-tuning", command=command, console=console
    )
    table = Table(title="chosen on validation rows", title_justify="left", box=SIMPLE_HEAD)
    for column in ("method", "settings"):
        table.add_column(column)
    table.add_column("score", justify="right")
    chosen: dict[str, list[str]] = {}
    record = {}
    at_edge: dict[str, list[str]] = {}
    for method in methods:
        labels = {number: f"{method}-{number}" for number in range(trials)}
        scores = {n: tuning.score(results[name]) for n, name in labels.items() if name in results}
        if not scores:
            raise InputError(f"--trials: every trial of method {method} failed")
        number = tuning.best(scores)
        chosen[method] = settings[method][number]
        table.add_row(method, " ".join(chosen[method]) or "defaults", f"{scores[number]:.3f}")
        rates = {n: configs[method][n].training.learning_rate for n in scores}
        edge = tuning.edge(rates, number)
        if edge:
            at_edge.setdefault(edge, []).append(method)
        record[method] = {
            "chosen": number,
            "edge": edge,
            "trials": [
                {"settings": more, "score": scores.get(n)}
                for n, more in enumerate(settings[method])
            ],
        }
    write_json(folder / "tuning" / CHOSEN_FILE, record)
    console.print(table)
    for edge, names in at_edge.items():
        console.print(
            f"The {edge} learning rate tried was the best of {', '.join(names)}: "
            f"a still {edge.replace('est', 'er')} one may be better.",
            highlight=False,
        )
    return chosen
