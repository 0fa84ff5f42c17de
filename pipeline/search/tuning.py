"""The same tuning budget for every method of a comparison, spent on validation rows."""

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from pipeline.config.config import Config
from pipeline.config.presets import METHODS, Knob
from pipeline.results.results import RunResult

SEED_OFFSET = 10_000
"""Trials have a seed of their own, so that no reported run was chosen by itself."""
VALIDATION = 0.3
"""Share of the scored rows for validation, where the config says none."""
LEARNING_RATE = 4.0
"""Trials go from the config's learning rate divided by this to it multiplied."""
ADAPTER_LEARNING_RATE = 10.0
"""Trials of LoRA go about this many times the config's rate: what it needs to learn as full
fine-tuning does (Schulman et al. 2025, "LoRA Without Regret"; here `RESULTS.md`, Concept-1K)."""


def candidates(config: Config, trials: int) -> list[list[str]]:
    """Settings of each of a method's trials: its defaults first, then spread evenly.

    With an adapter the second trial is the defaults at `ADAPTER_LEARNING_RATE` times the config's
    rate. Every further one moves the learning rate and, where the method has one, its own knob
    (`methods.METHODS`), by the Halton sequence (1960): half the rate, then twice of it, so that few
    trials look both ways. The same for any method with the same knob, and for any order.
    """
    from scipy.stats import qmc  # Half a second, and only here.

    knob = METHODS[config.method].knob
    middle = config.training.learning_rate
    found: list[list[str]] = [[]]
    if config.adapter:
        middle *= ADAPTER_LEARNING_RATE
        found.append([_learning_rate(middle)])
    # Point 0 is a corner and point 1 the middle, in whose place the defaults are.
    for x, y in qmc.Halton(d=2, scramble=False).random(trials + 1)[2:].tolist():
        rate = middle * LEARNING_RATE ** (2 * x - 1)
        settings = [_learning_rate(rate)]
        if knob:
            settings.append(f"{knob.key}={_rounded(_between(knob, y))}")
        found.append(settings)
    return found[:trials]


def _learning_rate(rate: float) -> str:
    return f"training.learning_rate={_rounded(rate)}"


def _between(knob: Knob, share: float) -> float:
    if knob.logarithmic:
        return float(knob.low * (knob.high / knob.low) ** share)
    return knob.low + (knob.high - knob.low) * share


def _rounded(value: float) -> str:
    # YAML reads 1e-3 as text and 1.0e-3 as a number.
    return f"{value:.2e}"


def trial(config: Config, number: int) -> Config:
    """The config of a method's trial of that number."""
    name = f"{config.name}-{config.method}-trial{number}"
    return config.model_copy(update={"seed": config.seed + SEED_OFFSET, "name": name})


def score(result: RunResult) -> float:
    """What a trial is chosen by: average performance on validation rows, mean over the sets."""
    sets: Mapping[str, Any] = result.metrics["validation"]
    return fmean(values["average_performance"] for values in sets.values())


def edge(rates: Mapping[int, float], chosen: int) -> str | None:
    """`smallest` or `largest` where the chosen trial's learning rate is that of all tried.

    The method might then do better still beyond it. None of fewer than three trials.
    """
    if len(rates) < 3:
        return None
    ends = {min(rates.values()): "smallest", max(rates.values()): "largest"}
    return ends.get(rates[chosen])


def best(scores: Mapping[int, float]) -> int:
    """Number of the best trial, the first of equals. Failed ones are not in `scores`."""
    return min(scores, key=lambda number: (-scores[number], number))
