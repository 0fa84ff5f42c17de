"""What `run` and `compare` share: execute, then print results and where to look."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from jobs.tables import heading, number, table
from pipeline.config.config import Config
from pipeline.config.naming import CHANGES, method_description, method_name
from pipeline.plan.plan import Run
from pipeline.results.comparison import BASELINE, COMPARED, Estimate, compare
from pipeline.results.model_card import MODEL
from pipeline.results.results import RunResult, evaluation_sets, groups, metric
from pipeline.run import REPORT_FILE, REPORTS_EACH, execute
from pipeline.secrets import masked

METRICS_SHOWN = ("average_performance", "backward_transfer", "learning_accuracy", "forgetting",
                 "forward_transfer")  # fmt: skip
_AFTER = 24
"""Characters for the names of an accuracy matrix's rows."""


def execute_runs(runs: Mapping[str, Run], folder: Path, title: str, command: str) -> None:
    """Execute, then print matrices, metrics and places."""
    console = Console()
    named = ", ".join(runs) if len(runs) <= REPORTS_EACH else f"{len(runs)} runs"
    console.print(f"[bold]{title}[/]: {named}", highlight=False)
    for run in runs.values():
        if (name := method_name(run.config)).endswith(CHANGES):
            line = f"  {name}: {method_description(run.config)}"
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    results = execute(runs, folder, title=title, command=command, console=console)
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
        base = metrics.get("base", {}) if name == metrics["evaluation_set"] else {}
        held_out = {"base": base["facts"]} if "facts" in base else {}
        text = base.get("text_loss")
        names = [*metrics["tasks"], *(f"({skill})" for skill in held_out)]
        # Where names do not fit, columns are numbered as rows are.
        numbered = sum(map(len, names)) + 3 * len(names) + 20 > console.width
        if numbered:
            names[: len(metrics["tasks"])] = map(str, range(1, len(metrics["tasks"]) + 1))
        columns = [*map(escape, names), *(["text loss"] if text else [])]
        rows = [
            [
                *row,
                *(scores[index] for scores in held_out.values()),
                *([text[index]] if text else []),
            ]
            for index, row in enumerate(values["accuracy_matrix"])
        ]
        width = max(5, *map(len, columns)) + 2
        fitting = max(1, (console.width - _AFTER) // width)
        for first in range(0, len(columns), fitting):
            part = slice(first, first + fitting)
            title = f"{label}: {name}" + ", continued" * bool(first)
            matrix = table(("after",), columns[part], title=title)
            for index, row in enumerate(rows):
                after = metrics["tasks"][index - 1] if index else "base model"
                after = f"{index} {after}" if numbered and index else after
                matrix.add_row(Text(after), *map(number, row[part]))
            console.print(matrix)


def print_metrics(console: Console, results: Mapping[str, RunResult]) -> None:
    """The metrics of every run and evaluation set, a line each."""
    lines = table(("run", "scored on"), [*map(heading, METRICS_SHOWN)], title="metrics")
    for label, result in results.items():
        for name, values in result.metrics["evaluation_sets"].items():
            found = [metric(values, key) for key in METRICS_SHOWN]
            lines.add_row(escape(label), escape(name), *map(number, found))
    console.print(lines)


def print_comparison(console: Console, results: Sequence[RunResult]) -> None:
    """Means over seeds with their intervals, and paired differences, a table an evaluation set."""
    for name in evaluation_sets(results):
        others = ("backward_transfer", "learning_accuracy")
        titles = [heading(key) for key in (COMPARED, *others)]
        methods = table(
            ("method",),
            ["seeds", *titles, f"vs\n{BASELINE}", "vs\ncontrols"],
            title=f"{escape(name)}: mean over seeds ± 95 % interval",
            caption=f"vs {BASELINE}, vs controls: difference of the averages, paired by seed",
            caption_justify="left",
        )
        for line in compare(results, name, (COMPARED, *others)):
            controls = [each for of, each in line.differences.items() if of != BASELINE]
            methods.add_row(
                escape(line.group.label),
                str(len(line.group.runs)),
                _estimate(line.metrics.get(COMPARED)),
                *(number(_mean(line.metrics.get(key))) for key in others),
                _estimate(line.differences.get(BASELINE)),
                "\n".join(map(_estimate, controls)) or "-",
            )
        console.print(methods)


def _mean(value: Estimate | None) -> float | None:
    return value.mean if value else None


def _estimate(value: Estimate | None) -> str:
    if value is None:
        return "-"
    spread = "" if value.half_width is None else f" ±{value.half_width:.3f}".replace("0.", ".")
    return number(value.mean) + spread
