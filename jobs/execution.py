"""What `run` and `compare` share: execute, then print results and where to look."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.config.config import Config
from pipeline.errors import StageFailed
from pipeline.plan.plan import Run
from pipeline.results.comparison import BASELINE, COMPARED, Estimate, compare
from pipeline.results.model_card import MODEL
from pipeline.results.results import RunResult, evaluation_sets, groups
from pipeline.run import REPORT_FILE, REPORTS_EACH, execute
from pipeline.secrets import masked

METRIC_COLUMNS = {
    "average_performance": "average",
    "backward_transfer": "backward",
    "learning_accuracy": "learned",
    "forward_transfer": "forward",
}


def execute_runs(runs: Mapping[str, Run], folder: Path, title: str, command: str) -> int:
    """Execute, print matrices, metrics and places; exit code 1 where a stage failed."""
    console = Console()
    named = ", ".join(runs) if len(runs) <= REPORTS_EACH else f"{len(runs)} runs"
    console.print(f"[bold]{title}[/]: {named}", highlight=False)
    try:
        results = execute(runs, folder, title=title, command=command, console=console)
    except StageFailed as failure:
        return print_failure(failure)
    by_label = dict(zip(runs, results, strict=True))
    if len(runs) <= REPORTS_EACH:
        for label, result in by_label.items():
            print_matrices(console, label, result)
    if len(groups(results)) < len(results):
        print_comparison(console, results)
    else:
        print_metrics(console, by_label)
    first = next(iter(runs.values())).config
    places = [f"report      {folder / REPORT_FILE}", *places_beside(first, folder)]
    if len(runs) <= REPORTS_EACH:
        places += [f"final model {_final_model(run)}" for run in runs.values()]
    for place in places:
        console.print(place, highlight=False, markup=False, soft_wrap=True)
    return 0


def print_failure(failure: object) -> int:
    """Say on stderr why a command failed; the exit code."""
    Console(stderr=True, soft_wrap=True).print(f"agcl: {failure}", markup=False, highlight=False)
    return 1


def places_beside(config: Config, folder: Path) -> list[str]:
    """Lines that say where else than in a folder its results are: MLflow, an object store."""
    lines = []
    if not config.tracking.enabled:
        pass
    elif config.tracking.uri is not None:
        lines.append(f"MLflow      {masked(config.tracking.uri)}")
    elif config.storage.tracking_uri is not None:
        lines.append(f"MLflow UI   agcl ui --storage {config.storage}")
    if (place := config.storage.place(folder)) != str(folder):
        lines.append(f"stored      {place}")
    return lines


def _final_model(run: Run) -> str:
    final = run.resolved[run.plan.final_model]
    return final.storage.uri_of_files(final.folder) or str(run.folder / MODEL)


def print_matrices(console: Console, label: str, result: RunResult) -> None:
    """The accuracy matrix of every evaluation set."""
    metrics = result.metrics
    for name, values in metrics["evaluation_sets"].items():
        table = Table(
            title=f"{label}: {name}",
            title_justify="left",
            title_style="bold",
            box=SIMPLE_HEAD,
            collapse_padding=True,
            pad_edge=False,
        )
        table.add_column("after", no_wrap=True)
        held_out = metrics["held_out"] if name == metrics["evaluation_set"] else {}
        text = metrics.get("text_loss") if name == metrics["evaluation_set"] else None
        names = [*metrics["tasks"], *(f"({skill})" for skill in held_out)]
        # Where names do not fit, columns are numbered as rows are.
        numbered = sum(map(len, names)) + 3 * len(names) + 20 > console.width
        for column, task in enumerate(names, start=1):
            short = str(column) if numbered and column <= len(metrics["tasks"]) else task
            table.add_column(Text(short), justify="right")
        if text:
            table.add_column("text loss", justify="right")
        for index, row in enumerate(values["accuracy_matrix"]):
            scores = [*row, *(scores[index] for scores in held_out.values())]
            if text:
                scores.append(text[index])
            after = metrics["tasks"][index - 1] if index else "base model"
            after = f"{index} {after}" if numbered and index else after
            table.add_row(Text(after), *(_number(score) for score in scores))
        console.print(table)


def print_metrics(console: Console, results: Mapping[str, RunResult]) -> None:
    """The metrics of every run and evaluation set, a line each."""
    table = Table(
        title="metrics",
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        collapse_padding=True,  # All columns in 80 characters.
    )
    for column in ("run", "scored on"):
        table.add_column(column, no_wrap=True)
    for column in [*METRIC_COLUMNS.values(), "forgetting"]:
        table.add_column(column, justify="right")
    for label, result in results.items():
        for name, values in result.metrics["evaluation_sets"].items():
            numbers: list[Any] = [values[key] for key in METRIC_COLUMNS]
            numbers.append(values["forgetting"]["mean"])
            table.add_row(label, name, *(_number(number) for number in numbers))
    console.print(table)


def print_comparison(console: Console, results: Sequence[RunResult]) -> None:
    """Means over seeds with their intervals, and paired differences, a table an evaluation set."""
    for name in evaluation_sets(results):
        table = Table(
            title=f"{name}: mean over seeds ± 95 % interval",
            caption=f"-{BASELINE}, -controls: difference of the averages, paired by seed",
            caption_justify="left",
            title_justify="left",
            title_style="bold",
            box=SIMPLE_HEAD,
            collapse_padding=True,
            pad_edge=False,  # All columns in 80 characters.
        )
        table.add_column("method", no_wrap=True)
        others = ("backward_transfer", "learning_accuracy")
        titles = [METRIC_COLUMNS[key] for key in (COMPARED, *others)]
        for column in [*titles, f"-{BASELINE}", "-controls"]:
            table.add_column(column, justify="right", no_wrap=True)
        for line in compare(results, name, (COMPARED, *others)):
            controls = [each for of, each in line.differences.items() if of != BASELINE]
            table.add_row(
                line.group.label,
                _estimate(line.metrics.get(COMPARED)),
                *(_number(_mean(line.metrics.get(key))) for key in others),
                _estimate(line.differences.get(BASELINE)),
                "\n".join(map(_estimate, controls)) or "-",
            )
        console.print(table)


def _mean(value: Estimate | None) -> float | None:
    return value.mean if value else None


def _estimate(value: Estimate | None) -> str:
    if value is None:
        return "-"
    spread = "" if value.half_width is None else f" ±{value.half_width:.3f}".replace("0.", ".")
    return _number(value.mean) + spread


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
