"""`agcl compare`: several methods and seeds over the same sequence, shared stages computed once."""

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from rich.console import Console

from agcl.errors import InputError
from jobs.output import execute_runs
from jobs.tables import table
from jobs.trials import TrialTable
from pipeline.config import loading
from pipeline.config.config import Config
from pipeline.config.naming import method_name
from pipeline.config.revision import pinned
from pipeline.execution.progress import warn
from pipeline.plan.plan import Run
from pipeline.results.files import CONFIG_FILE, SEARCH_FILE
from pipeline.results.run_folder import check_folder, locked
from pipeline.run import open_run
from pipeline.search.search import VALIDATION_SHARE
from pipeline.search.trial import undecided
from pipeline.search.tuning import execute_tuning, make_room, open_tuning, tuned


def main(arguments: argparse.Namespace, command: str) -> None:
    """Tune every method if asked to, run it with every seed, print all results."""
    methods = arguments.methods
    settings = list(arguments.settings)
    first = loading.load(arguments.config, settings, method=methods[0])
    if arguments.trials > 1 and not first.evaluation.validation:
        settings.append(f"evaluation.validation={VALIDATION_SHARE}")
    folder = first.storage.root / f"{first.name}-compare"
    first.storage.check()  # Before its stored configs are read.
    if first.model.on_hub:  # Once for all runs: the branch may move in between.
        files = begun(first, folder, methods, arguments.seeds)
        settings.append(f"model.revision={pinned(first, files).model.revision}")

    def load(more: list[str], method: str) -> Config:
        return loading.load(arguments.config, [*settings, *more], method=method)

    configs = [load([], method) for method in methods]
    if arguments.trials > 1:
        # Their folders are looked at now, not after hours of trials.
        for config, place in _places(configs, folder, arguments.seeds):
            check_folder(config, place / CONFIG_FILE, tuned=tuned(config))
        chosen = _tune(load, methods, arguments.trials, folder / "tuning")
        configs = [load(chosen[method], method) for method in methods]
        _make_room(_places(configs, folder, arguments.seeds), folder)
    runs: dict[str, Run] = {}
    for config, place in _places(configs, folder, arguments.seeds):
        runs[place.name] = open_run(config, place)
    execute_runs(runs, folder, folder.name, command)


def _places(configs: Iterable[Config], folder: Path, seeds: int) -> Iterator[tuple[Config, Path]]:
    """The runs of each method's config: one per seed, with its folder."""
    names: dict[str, str] = {}
    for config in configs:
        name = method_name(config)
        if name in names:
            raise InputError(
                f"--methods: with these settings {names[name]} and {config.method} are the same"
            )
        names[name] = config.method
        for seed in range(config.seed, config.seed + seeds):
            yield config.model_copy(update={"seed": seed}), folder / _label(name, seed, seeds)


def _make_room(places: Iterable[tuple[Config, Path]], folder: Path) -> None:
    """Delete the runs of an earlier tuning that chose other settings, and name them."""
    console = Console(highlight=False)
    with locked(folder, console):
        for config, place in places:
            if make_room(config, place):
                text = f"  {place.name}: other settings won than before; its old run is replaced"
                console.print(text, markup=False, soft_wrap=True)


def _label(name: str, seed: int, seeds: int) -> str:
    """A run's name in the comparison: of its folder, too."""
    return name if seeds == 1 else f"{name}-seed{seed}"


def begun(first: Config, folder: Path, methods: Sequence[str], seeds: int) -> list[Path]:
    """The configs that an earlier command for the same comparison may have left."""
    labels = {
        _label(method, seed, seeds)
        for method in methods
        for seed in range(first.seed, first.seed + seeds)
    }
    files = [folder / "tuning" / SEARCH_FILE, *(folder / each / CONFIG_FILE for each in labels)]
    return sorted({*files, *folder.glob(f"*/{CONFIG_FILE}")})  # In a bucket, all may be elsewhere.


def _tune(
    load: Callable[[list[str], str], Config], methods: Sequence[str], trials: int, folder: Path
) -> dict[str, list[str]]:
    """Run the trials of every method, print what was chosen; the settings by method."""
    console = Console(highlight=False)
    search = open_tuning(load, methods, trials, folder)
    console.print(f"[bold]tuning[/]: {trials} trials per method, {search.num_trials} in all")
    watch = TrialTable(console, search.num_trials)
    chosen = execute_tuning(search, console=console, watch=watch)
    for trial in watch.trials.values():
        if trial.reason:
            text = f"  failed trial {search.label(trial.number)}: {trial.reason}"
            console.print(text, style="yellow", markup=False, soft_wrap=True)
    best_of = table(("method", "settings"), ("score",), title="chosen on validation rows")
    for method, best in chosen.items():
        best_of.add_row(method, " ".join(best.settings) or "defaults", f"{best.score:.3f}")
    console.print(best_of)
    for method in chosen:
        tried = [t for t in watch.trials.values() if t.settings["method"] == method]
        if warning := undecided(tried):
            warn(console, f"{method}: {warning}")
    for edge, other in (("smallest", "smaller"), ("largest", "larger")):
        names = [method for method, best in chosen.items() if best.edge == edge]
        if names:
            console.print(
                f"The {edge} learning rate tried was the best of {', '.join(names)}: a still "
                f"{other} one may be better."
            )
    return {method: list(best.settings) for method, best in chosen.items()}
