"""What `run` and `compare` share: execute, then print results and where to look."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import fill

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from jobs.tables import heading, number, table
from pipeline.config.config import Config
from pipeline.config.naming import CHANGES, method_description, method_name
from pipeline.config.weights import slow_here
from pipeline.execution.progress import warn
from pipeline.plan.plan import Run
from pipeline.results.comparison import BASELINE, COMPARED, Mean, compare, compare_base
from pipeline.results.files import MODEL, REPORT_FILE
from pipeline.results.results import (
    RunResult,
    base_measures,
    base_title,
    evaluation_sets,
    metric,
    runs_by_method,
)
from pipeline.run import REPORTS_EACH, execute
from pipeline.secrets import masked

METRICS_SHOWN = ("average_performance", "backward_transfer", "learning_accuracy", "forgetting",
                 "forward_transfer")  # fmt: skip
_AFTER = 24
"""Characters for the names of an accuracy matrix's rows."""
_MOST_PROBES = 3
"""A comparison of methods shows the mean of more probes, and not each of them."""


def execute_runs(runs: Mapping[str, Run], folder: Path, title: str, command: str) -> None:
    """Execute, then print matrices, metrics and places."""
    console = Console()
    named = ", ".join(runs) if len(runs) <= REPORTS_EACH else f"{len(runs)} runs"
    console.print(f"[bold]{title}[/]: {named}", highlight=False)
    _say_before(console, [run.config for run in runs.values()])
    results = execute(runs, folder, title=title, command=command, console=console)
    by_label = dict(zip(runs, results, strict=True))
    if len(runs) <= REPORTS_EACH:
        for label, result in by_label.items():
            print_matrices(console, label, result)
            print_base(console, label, result)
    if len(runs_by_method(results)) < len(results):
        print_comparison(console, results)
    else:
        print_metrics(console, by_label)
    if len(runs) > 1:
        print_base_comparison(console, results)
    _advise(console, by_label)
    first = next(iter(runs.values())).config
    places = [f"report      {folder / REPORT_FILE}", *places_beside(first, folder)]
    if len(runs) <= REPORTS_EACH:
        places += [f"final model {_final_model(run)}" for run in runs.values()]
    for place in places:
        console.print(place, highlight=False, markup=False, soft_wrap=True)


def _say_before(console: Console, configs: Sequence[Config]) -> None:
    """What the user should know of the configs before they run."""
    changed = {method_name(config): method_description(config) for config in configs}
    for name, said in changed.items():
        if name.endswith(CHANGES):
            console.print(f"  {name}: {said}", highlight=False, markup=False, soft_wrap=True)
    for line in dict.fromkeys(map(slow_here, configs)):
        if line:
            warn(console, line)
    unused = {
        method_name(config): None
        for config in configs
        if config.base.protect != "none" and not config.measures_base
    }
    if unused:
        console.print(
            "  base.protect is ignored without an item in protect that needs an importance, or "
            f"adapter.init=corda: {', '.join(unused)}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def _advise(console: Console, results: Mapping[str, RunResult]) -> None:
    """Say which runs never scored above 0 after training a task, and where to look."""
    silent = [
        label
        for label, result in results.items()
        if not any(of["learning_accuracy"] for of in result.metrics["evaluation_sets"].values())
    ]
    if silent:
        warn(
            console,
            f"no answer scored above 0, even right after its task's training: {', '.join(silent)}. "
            "The report shows answers beside those expected; usual causes are too few epochs, a "
            "low training.learning_rate, or a tasks.scorer that does not fit the answers",
        )


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
    tasks = result.metrics["tasks"]
    # Where names do not fit, columns are numbered as rows are.
    numbered = sum(map(len, tasks)) + 3 * len(tasks) + 20 > console.width
    names = [str(i) for i in range(1, len(tasks) + 1)] if numbered else tasks
    for name, values in result.metrics["evaluation_sets"].items():
        columns = list(zip(*values["accuracy_matrix"], strict=True))
        of = " (trained rows)" * (name == "memorization")
        _print_by_task(console, f"{label}: {name}{of}", tasks, names, columns, numbered=numbered)


def print_base(console: Console, label: str, result: RunResult) -> None:
    """What the base model still knows, before the first and after every task."""
    measures = {key: of for key, of in base_measures(result).items() if key != "probes"}
    names = [_heading(measure) for measure in measures]
    title = f"{label}: what the base model still knows"
    _print_by_task(console, title, result.metrics["tasks"], names, list(measures.values()))


def _heading(measure: str) -> str:
    """A measure's title as a narrow column has it, and for probes what their number is."""
    return fill(base_title(measure), 12) + "\nacc_norm" * measure.startswith("probes")


def _print_by_task(
    console: Console,
    title: str,
    tasks: Sequence[str],
    names: Sequence[str],
    columns: Sequence[Sequence[float]],
    *,
    numbered: bool = False,
) -> None:
    """Columns of one number per row of the accuracy matrix, in as many tables as they need."""
    widths = [_width(name) for name in names]
    for count, part in enumerate(_fitting(widths, console.width - _AFTER)):
        head = title + ", continued" * bool(count)
        lines = table(("after",), [*map(escape, names[part])], title=escape(head))
        for index, row in enumerate(zip(*columns[part], strict=True)):
            after = tasks[index - 1] if index else "base model"
            after = f"{index} {after}" if numbered and index else after
            lines.add_row(Text(after), *map(number, row))
        console.print(lines)


def _width(*cells: str) -> int:
    """Characters of a column with these cells and the gap before it."""
    return max(5, *(len(line) for cell in cells for line in cell.splitlines())) + 2


def _fitting(widths: Sequence[int], room: int) -> Iterator[slice]:
    """Split columns into tables that are no wider than `room`, of one column at least."""
    first = 0
    for end in range(1, len(widths) + 1):
        if end == len(widths) or sum(widths[first : end + 1]) > room:
            yield slice(first, end)
            first = end


def print_metrics(console: Console, results: Mapping[str, RunResult]) -> None:
    """The metrics of every run and evaluation set, a line each."""
    lines = table(("run", "scored on"), [*map(heading, METRICS_SHOWN)], title="metrics")
    for label, result in results.items():
        for name, values in result.metrics["evaluation_sets"].items():
            found = [metric(values, key) for key in METRICS_SHOWN]
            lines.add_row(escape(label), escape(name), *map(number, found))
    console.print(lines)


def print_comparison(console: Console, results: Sequence[RunResult]) -> None:
    """Print means over seeds with intervals and paired differences, a table per evaluation set."""
    for name in evaluation_sets(results):
        others = ("backward_transfer", "learning_accuracy")
        titles = [heading(key) for key in (COMPARED, *others)]
        methods = table(
            ("method",),
            ["seeds", *titles, f"vs\n{BASELINE}", "vs\ncontrols"],
            title=f"{escape(name)}: mean over seeds ± 95 % interval",
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
        _print_caption(
            console, f"vs {BASELINE}, vs controls: difference of the averages, paired by seed"
        )


def print_base_comparison(console: Console, results: Sequence[RunResult]) -> None:
    """What the base model still knows, a line per method: base → after the last task."""
    found = compare_base(results)
    probes = [measure for measure in found if measure.startswith("probes/")]
    for measure in probes if len(probes) > _MOST_PROBES else ["probes"]:
        found.pop(measure, None)
    labels = list(dict.fromkeys(label for by_label in found.values() for label in by_label))
    names = [_heading(measure) for measure in found]
    columns = [
        [_change(measure, by_label.get(label)) for label in labels]
        for measure, by_label in found.items()
    ]
    widths = [_width(name, *cells) for name, cells in zip(names, columns, strict=True)]
    room = console.width - min(_AFTER, max(map(len, labels), default=0) + 3)
    for count, part in enumerate(_fitting(widths, room)):
        title = "what the base model still knows" + ", continued" * bool(count)
        over_seeds = any("±" in cell for cells in columns for cell in cells)
        caption = "base → after the last task"
        caption += ", mean over seeds ± 95 % interval" * over_seeds
        lines = table(("method",), [*map(escape, names[part])], title=title)
        for label, *cells in zip(labels, *columns[part], strict=True):
            lines.add_row(escape(label), *cells)
        console.print(lines)
        _print_caption(console, caption)


def _print_caption(console: Console, caption: str) -> None:
    """What a table's numbers are, below it; rich would break it at the table's width."""
    console.print(f"[dim]{caption}[/]\n", highlight=False)


def _change(measure: str, rows: Sequence[Mean] | None) -> str:
    if not rows:
        return "-"
    # The KL of the base model from itself is 0.
    before = "" if measure.startswith("kl") else f"{number(rows[0].mean)} → "
    return before + _estimate(rows[-1])


def _mean(value: Mean | None) -> float | None:
    return value.mean if value else None


def _estimate(value: Mean | None) -> str:
    if value is None:
        return "-"
    spread = "" if value.half_width is None else " ±" + f"{value.half_width:.3f}".removeprefix("0")
    return number(value.mean) + spread
