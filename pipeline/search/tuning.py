"""The same tuning budget for every method of a comparison, spent on validation rows."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from agcl.errors import InputError
from rich.console import Console

from pipeline.config.config import Config
from pipeline.config.presets import METHODS, Knob
from pipeline.config.search import SearchSection
from pipeline.errors import Failed
from pipeline.results.files import CHOSEN_FILE, CONFIG_FILE, TRIALS_FILE
from pipeline.results.run_folder import check_folder
from pipeline.run import open_run
from pipeline.search import trial as trials
from pipeline.search.engine import Observe, Search
from pipeline.search.search import execute_trials, mirrored_search, only_validation
from pipeline.search.space import RATE_FACTOR, Settings, protects
from pipeline.search.trial import Trial, why_none
from pipeline.storage.artifact import write_json

SEED_OFFSET = 10_000
"""Added to the seed of trials, so that no reported run is chosen by its own result."""
ADAPTER_RATE_FACTOR = 10.0
"""Trials of LoRA are around this many times the config's rate: what it needs to learn as full
fine-tuning does (Schulman et al. 2025, "LoRA Without Regret"; here `RESULTS.md`, Concept-1K)."""
_RATE = "training.learning_rate"


@dataclass(frozen=True)
class Chosen:
    """A method's best trial."""

    chosen: int
    """Its number among the method's trials."""
    settings: Sequence[str]
    """`key=value`; empty for the method's defaults."""
    score: float
    """Average performance on validation rows, mean over the evaluation sets."""
    edge: str | None
    """`smallest` or `largest` if no trial had a learning rate further out."""
    trials: Sequence[Mapping[str, Any]]
    """`settings` and `score` of every trial; the score of a failed one is None."""


def candidates(config: Config, num_trials: int) -> list[dict[str, float]]:
    """Settings of each of a method's trials: its defaults first, then spread evenly.

    With an adapter the second trial is the defaults at `ADAPTER_RATE_FACTOR` times the config's
    rate. Every further one moves the learning rate and, if the method has one, its own knob
    (`METHODS`), by the Halton sequence (1960): half the rate, then twice the rate, so that few
    trials look both ways. Methods with the same knob get the same values, whatever is compared.
    """
    from scipy.stats import qmc  # Half a second, and only here.

    knob = METHODS[config.method].knob
    if knob and knob.key.startswith("protect.0.") and not protects(config, 0):
        knob = None
    middle = config.training.learning_rate
    found: list[dict[str, float]] = [{}]
    if config.adapter:
        middle *= ADAPTER_RATE_FACTOR
        found.append({_RATE: _rounded(middle)})
    # The defaults stand for points 0, a corner, and 1, the middle. Optuna's QMCSampler cannot skip
    # them, and assigns dimensions by name: a method's knob would decide which rates it tries.
    for x, y in qmc.Halton(d=2, scramble=False).random(num_trials + 1)[2:].tolist():
        values = {_RATE: _rounded(middle * RATE_FACTOR ** (2 * x - 1))}
        if knob:
            values[knob.key] = _rounded(_between(knob, y))
            if knob.key.endswith(".energy"):  # More is not stored of a moment.
                values[knob.key] = min(values[knob.key], config.importance.keep)
        found.append(values)
    return found[:num_trials]


def tuned(config: Config) -> set[str]:
    """The settings that may differ between the trials of the config's method."""
    knob = METHODS[config.method].knob
    return {_RATE, knob.key} if knob else {_RATE}


def make_room(config: Config, folder: Path) -> bool:
    """Delete the folder of the same run with other tuned settings; returns whether there was one.

    Raises `InputError` if the folder holds any other run.
    """
    file = folder / CONFIG_FILE
    check_folder(config, file, tuned=tuned(config))
    try:
        check_folder(config, file)
    except InputError:
        # More trials can change the winner. The old winner's folder holds only copies and links.
        config.storage.delete_folder(folder)
        return True
    return False


def arguments(settings: Mapping[str, float]) -> list[str]:
    """Settings as on the command line."""
    # YAML reads 1e-3 as text and 1.00e-03 as a number.
    return [f"{key}={value:.2e}" for key, value in settings.items()]


def _between(knob: Knob, share: float) -> float:
    if knob.logarithmic:
        return float(knob.low * (knob.high / knob.low) ** share)
    return knob.low + (knob.high - knob.low) * share


def _rounded(value: float) -> float:
    return float(f"{value:.2e}")


def open_tuning(
    load: Callable[[list[str], str], Config], methods: Sequence[str], num_trials: int, folder: Path
) -> Search:
    """The trials of all methods as one search, whose points are all known beforehand.

    `load` reads a method's config with more settings. Raises `InputError` for bad input, and if
    the folder holds trials of another config.
    """
    known: dict[str, tuple[Settings, Config]] = {}
    for method in methods:
        for number, settings in enumerate(candidates(load([], method), num_trials)):
            config = only_validation(load(arguments(settings), method))
            update = {"seed": config.seed + SEED_OFFSET, "search": SearchSection()}
            config = config.model_copy(update=update)
            known[f"{method}-{number}"] = ({"method": method, **settings}, config)
    first = next(iter(known.values()))[1]
    search = Search(first, folder, len(known), known=known)
    for number, (settings, _) in enumerate(known.values()):
        run = search.run_of(number, settings)
        open_run(run.config, run.folder)
    return search


def execute_tuning(
    search: Search, *, console: Console, watch: AbstractContextManager[Observe]
) -> dict[str, Chosen]:
    """Run the trials of all methods side by side; the best of each, also in `tuning.json`.

    Raises `StageFailed` for a stage that all trials need, `Failed` if every trial of a method
    failed.
    """
    with mirrored_search(search, console) as mirror:
        found = execute_trials(search, mirror, console, watch)
        rates = [config.training.learning_rate for _, config in search.known.values()]
        by_method: dict[str, list[Trial]] = {}
        for trial in found:
            by_method.setdefault(trial.settings["method"], []).append(trial)
        chosen = {method: choose(tried, rates) for method, tried in by_method.items()}
        record = {method: best and asdict(best) for method, best in chosen.items()}
        write_json(search.folder / CHOSEN_FILE, record)
        failed = [
            f"method {method}: {why_none(by_method[method])}"
            for method, best in chosen.items()
            if best is None
        ]
        files = {name: search.folder / name for name in (TRIALS_FILE, CHOSEN_FILE)}
        mirror.finish(files, error="; ".join(failed))
    if failed:
        raise Failed("; ".join(failed))
    return {method: best for method, best in chosen.items() if best}


def choose(tried: Sequence[Trial], rates: Sequence[float]) -> Chosen | None:
    """The best of a method's trials, the first of equals; None if all failed.

    `rates` are the learning rates by trial number. With fewer than three finished trials, neither
    end of the rates is called an edge.
    """
    best = trials.best(tried)
    if best is None:
        return None
    listed: list[dict[str, Any]] = [
        {
            "settings": arguments({k: v for k, v in trial.settings.items() if k != "method"}),
            "score": trial.last.average if trial.state == "finished" and trial.last else None,
        }
        for trial in tried
    ]
    finished = [rates[trial.number] for trial in tried if trial.state == "finished"]
    ends = {min(finished): "smallest", max(finished): "largest"}
    edge = ends.get(rates[best.number]) if len(finished) > 2 else None
    number = tried.index(best)
    return Chosen(number, **listed[number], edge=edge, trials=listed)
