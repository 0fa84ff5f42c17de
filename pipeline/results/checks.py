"""Self-checks of a method's protections, over its seeds."""

import re
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config import yaml12
from pipeline.results.results import MethodRuns, RunResult, runs_by_method

_MOST_TAKEN = 0.5


def worst_checks(group: MethodRuns) -> dict[str, Any] | None:
    """Self-checks over all seeds and tasks; None for a method that protects nothing."""
    of_runs = [list(run.checks.values()) for run in group.runs if run.checks]
    if not of_runs:
        return None
    every = [check for checks in of_runs for check in checks]
    taken = _measured([checks[-1] for checks in of_runs], "directions_taken")
    return {
        "leak": max(_measured(every, "projection_leak"), default=None),
        "directions": fmean(taken) if taken else None,
        "movement": [
            fmean(tenth) for tenth in zip(*_measured(every, "movement_by_decile"), strict=True)
        ],
    }


def directions(group: MethodRuns) -> dict[str, float]:
    """By weight: the share of its input directions protected in the last task, mean over seeds.

    Empty without a projection, and for runs of versions that did not record it.
    """
    last = [list(run.checks.values())[-1:] for run in group.runs if run.checks]
    of_seeds = _measured([check for checks in last for check in checks], "directions_by_layer")
    names = of_seeds[0] if of_seeds else {}
    return {name: fmean(of[name] for of in of_seeds if name in of) for name in names}


def by_kind_and_layer(shares: Mapping[str, float]) -> tuple[list[str], NDArray[np.float64]]:
    """Kinds of module, and an array (kind, layer) of their shares; NaN where there is none.

    A layer's index is the first number in a weight's name; weights outside of layers are in 0.
    """
    places = {}
    for name in shares:
        number = re.search(r"\.(\d+)\.", name)
        kind = name[number.end() :] if number else name
        places[name] = (kind.removesuffix(".weight"), int(number[1]) if number else 0)
    kinds = list(dict.fromkeys(kind for kind, _ in places.values()))
    found = np.full((len(kinds), 1 + max(layer for _, layer in places.values())), np.nan)
    for name, (kind, layer) in places.items():
        found[kinds.index(kind), layer] = shares[name]
    return kinds, found


def crowded(runs: Sequence[RunResult]) -> list[str]:
    """One line per method that leaves less than half of a layer's inputs for later tasks."""
    by_method, lines = runs_by_method(runs), []
    for group in by_method:
        shares = directions(group)
        most = max(shares, key=lambda name: shares[name], default="")
        if shares and shares[most] > _MOST_TAKEN:
            count = sum(share > _MOST_TAKEN for share in shares.values())
            lines.append(
                (f"{group.label}: " if len(by_method) > 1 else "")
                + "protection leaves less than half of the input directions of "
                f"{count} of {len(shares)} layers for later tasks (most: "
                f"{most.removesuffix('.weight')}, {shares[most]:.0%} taken); "
                f"lower {' or '.join(_energies(group.runs[0]))}"
            )
    return lines


def _energies(run: RunResult) -> list[str]:
    """The config keys that set how many directions are protected."""
    config = yaml12.parse(run.config_yaml) or {}
    items = enumerate(config.get("protect", [{"kind": "project"}]))
    keys = [f"protect.{i}.energy" for i, item in items if item["kind"] == "project"]
    protects_base = config.get("base", {}).get("protect", "none") not in (None, "none")
    return keys + ["base.energy"] * protects_base


def _measured(checks: Sequence[Mapping[str, Any]], key: str) -> list[Any]:
    return [check[key] for check in checks if check.get(key) is not None]
