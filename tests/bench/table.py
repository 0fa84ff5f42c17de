"""`PYTHONPATH=tests python -m bench.table PLAN`: run a table's rows, seed by seed, and print it.

A plan is a YAML file: `config` and `set`, the settings of all rows; `rows`, each with a `method`,
its own `set`, and `trials`, settings to choose from; `columns`, and `choose`, the columns whose
mean on validation rows decides which trial's settings a row is run with. Paths in it are taken from
the environment: `path=${DATA}/concept_1k`.

Each finished row and seed is one line of the `.jsonl` beside the plan, so that a table of many
hours grows over days and machines, and prints without the artifacts. Stages run in this process,
one after the other; start several commands for several cores.
"""

import argparse
import fcntl
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from string import Template
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from scipy.stats import t as student
from transformers.utils import logging

from pipeline.config import loading
from pipeline.config.config import Config
from pipeline.execution.session import run_stages
from pipeline.plan.stage import ResolvedStage
from pipeline.run import open_run
from pipeline.search.search import only_validation
from pipeline.stages import metrics
from pipeline.stages.context import Context
from pipeline.stages.files import LOG_FILE, METRICS
from pipeline.storage.artifact import MANIFEST

TUNING_SEED = 10_000
"""Of runs on validation rows; far from the seeds that are compared."""


def main(arguments: list[str] | None = None) -> int:
    """Run what is asked for, then print the table."""
    given = _parsed(arguments)
    plan = yaml.safe_load(given.plan.read_text(encoding="utf-8"))
    torch.set_num_threads(given.threads)
    logging.disable_progress_bar()
    file = given.plan.with_suffix(".jsonl")
    names = given.rows or list(plan["rows"])
    for name in names:
        for more in (plan["rows"][name] or {}).get("trials", ()) if given.tune else ():
            _once(plan, name, TUNING_SEED, more.split(), file, given.storage)
        chosen = best_trial(plan, name, read(file))
        if chosen is None and given.seeds:
            print(f"{name}: trials missing, see --tune", file=sys.stderr)
        for seed in given.seeds if chosen is not None else ():
            _once(plan, name, seed, chosen, file, given.storage)
    print_table(plan, read(file))
    return 0


def _parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("plan", type=Path, help="a file of tests/bench/tables")
    parser.add_argument(
        "--seeds", type=int, nargs="*", default=[], help="run these seeds (default: only print)"
    )
    parser.add_argument("--rows", nargs="*", help="only these rows (default: all)")
    parser.add_argument(
        "--tune",
        action="store_true",
        help="first score the rows' trials on validation rows of seed 10000",
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument(
        "--storage", type=Path, default=Path("storage"), help="of the artifacts (default: storage)"
    )
    return parser.parse_args(arguments)


def configured(plan: Mapping[str, Any], row: str, seed: int, more: list[str]) -> Config:
    """The config of a row at a seed; `more` settings go last."""
    own = plan["rows"][row] or {}
    settings = [Template(each).substitute(os.environ) for each in plan["set"]]
    settings += [Template(each).substitute(os.environ) for each in own.get("set", [])]
    config = loading.load(
        Path(plan["config"]),
        [*settings, *more, f"seed={seed}", "tracking.enabled=false"],
        own.get("method", row),
    )
    return only_validation(config) if seed == TUNING_SEED else config


def best_trial(plan: Mapping[str, Any], row: str, lines: list[dict[str, Any]]) -> list[str] | None:
    """The settings of the row's best trial; [] without trials, None before all are finished."""
    trials = [each.split() for each in (plan["rows"][row] or {}).get("trials", ())]
    if not trials:
        return []
    scored = {
        tuple(line["set"]): fmean(at(line, plan["columns"][title]) for title in plan["choose"])
        for line in lines
        if line["row"] == row and line["seed"] == TUNING_SEED
    }
    if any(tuple(each) not in scored for each in trials):
        return None
    return max(trials, key=lambda each: scored[tuple(each)])


def read(file: Path) -> list[dict[str, Any]]:
    """The finished rows."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _once(
    plan: Mapping[str, Any], row: str, seed: int, more: list[str], file: Path, storage: Path
) -> None:
    """Run a row at a seed and append its line, unless it is there or another process runs it."""
    key = {"row": row, "seed": seed, "set": more}
    name = "-".join([file.stem, row, str(seed), *more]).replace("/", "_")
    with _claimed(storage / "claims" / name) as ours:
        if not ours or any(all(line[k] == v for k, v in key.items()) for line in read(file)):
            return
        print(f"{row}, seed {seed} {' '.join(more)}", file=sys.stderr, flush=True)
        config = configured(plan, row, seed, [*more, f"storage={storage.absolute()}"])
        measured = run(config)
        line = {**key, "commit": _commit(), **measured}
        with file.open("a", encoding="utf-8") as opened:
            fcntl.flock(opened, fcntl.LOCK_EX)
            opened.write(json.dumps(line) + "\n")


def run(config: Config) -> dict[str, Any]:
    """Run a config's stages in this process; its metrics and what it cost.

    The last task's importance, which serves a summary only, is not measured.
    """
    opened = open_run(config)
    tasks = opened.plan.tasks
    last = f"attribute/{len(tasks)}-{tasks[-1]}"
    stages = [
        stage
        for name, stage in opened.resolved.items()
        if name != last and stage.fn is not metrics.report
    ]
    run_stages(stages, Context(ray_data=False), lambda records: None)
    (report,) = (s for s in opened.resolved.values() if s.fn is metrics.report)
    inputs = {role: path for role, path in report.inputs.items() if (path / MANIFEST).exists()}
    with TemporaryDirectory() as scratch:
        metrics.report(report.config, inputs, Path(scratch), Context())
        found = json.loads((Path(scratch) / METRICS).read_text(encoding="utf-8"))
    kept = {key: found[key] for key in ("evaluation_sets", "base") if key in found}
    return {**kept, "cost": _cost(stages)}


def _cost(stages: list[ResolvedStage]) -> dict[str, float]:
    """Seconds per step and in all, highest memory, and bytes of importances, of a run's stages."""
    seconds: dict[str, float] = {}
    steps, memory, extra = 0, 0.0, 0
    for stage in stages:
        kind = stage.name.split("/")[0]
        manifest = json.loads((stage.folder / MANIFEST).read_text(encoding="utf-8"))
        seconds[kind] = seconds.get(kind, 0.0) + manifest["seconds"]
        log = stage.folder / LOG_FILE
        if kind == "train" and log.exists():
            lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
            steps += max((line["step"] for line in lines), default=0)
            memory = max([memory, *(line.get("peak_memory_gb", 0.0) for line in lines)])
        if kind in ("attribute", "base"):
            extra += sum(f.stat().st_size for f in stage.folder.rglob("*") if f.is_file())
    train = seconds.get("train", 0.0)
    return {
        **{f"{kind}_seconds": round(value, 1) for kind, value in sorted(seconds.items())},
        "seconds_per_step": round(train / steps, 3) if steps else 0.0,
        "peak_memory_gb": round(memory, 2),
        "importance_mb": round(extra / 1e6, 1),
    }


def print_table(plan: Mapping[str, Any], lines: list[dict[str, Any]]) -> None:
    """Print the mean and the 95 % interval of every column, and differences from `against`."""
    columns: dict[str, str] = plan["columns"]
    values: dict[str, dict[int, dict[str, float]]] = {}
    bases: dict[tuple[str, int], Mapping[str, Any]] = {}
    tuning = [line for line in lines if line["seed"] == TUNING_SEED]
    for line in lines:
        if line["seed"] != TUNING_SEED and line["set"] == best_trial(plan, line["row"], lines):
            found = {title: at(line, path) for title, path in columns.items()}
            values.setdefault(line["row"], {})[line["seed"]] = found
            bases[line["row"], line["seed"]] = line.get("base", {})
    if tuning:
        print("Validation rows of seed 10000:\n")
        _print_rows(
            {
                f"{line['row']} {' '.join(line['set'])}": {
                    0: {t: at(line, p) for t, p in columns.items()}
                }
                for line in tuning
            },
            columns,
        )
    ordered = {row: values[row] for row in plan["rows"] if row in values}
    _print_rows(ordered, columns)
    if (base := plan.get("against")) in ordered:
        print(f"`{base}` minus, paired by seed where both started from the same base model:\n")
        differences = {
            row: {
                seed: {title: ordered[base][seed][title] - of[title] for title in columns}
                for seed, of in by_seed.items()
                if seed in ordered[base] and _same_base(bases[base, seed], bases[row, seed])
            }
            for row, by_seed in ordered.items()
            if row != base
        }
        _print_rows({row: found for row, found in differences.items() if found}, columns)


def _same_base(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two runs measured the same base model; each machine trains its own built-in one.

    Machines and precisions round differently, by less than 1 in 10,000.
    """
    return all(
        math.isclose(one[measure][0], other[measure][0], rel_tol=1e-4)
        for measure in one.keys() & other.keys()
        if isinstance(one[measure], list)
    )


def at(line: Mapping[str, Any], path: str) -> float:
    """A number of a finished row, by its dotted path; `NaN` if it is not there.

    Trials of tasks with a test set of their own score validation rows in its place.
    """
    parts = path.split(".")
    if parts[0] == "evaluation_sets" and [*line[parts[0]]] == ["validation"]:
        parts[1] = "validation"
    value: Any = line
    for part in parts:
        try:
            value = value[int(part)] if isinstance(value, list) else value[part]
        except (KeyError, IndexError, TypeError):
            return float("nan")
    return float(value)


def _print_rows(
    rows: Mapping[str, Mapping[int, Mapping[str, float]]], columns: Mapping[str, str]
) -> None:
    print(f"| | seeds | {' | '.join(columns)} |\n|{' --- |' * (len(columns) + 2)}")
    for row, by_seed in rows.items():
        cells = [_cell([of[title] for of in by_seed.values()]) for title in columns]
        print(f"| {row} | {len(by_seed)} | {' | '.join(cells)} |")
    print()


def _cell(values: list[float]) -> str:
    count = len(values)
    if count < 2:
        return f"{values[0]:.3f}" if values else ""
    mean = fmean(values)
    error = (sum((value - mean) ** 2 for value in values) / (count - 1) / count) ** 0.5
    return f"{mean:.3f} ±{student.ppf(0.975, count - 1) * error:.3f}"


@contextmanager
def _claimed(file: Path) -> Iterator[bool]:
    """Whether this process alone has the file, for as long as it works."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(
        command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    ).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
