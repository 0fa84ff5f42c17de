"""`report.html`: one self-contained page on one or several runs over the same tasks."""

import csv
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from datetime import timedelta
from io import StringIO
from itertools import chain
from pathlib import Path
from typing import Any

from agcl.errors import InputError

from pipeline.config import yaml12
from pipeline.results.checks import crowded, worst_checks
from pipeline.results.comparison import (
    BASELINE,
    COMPARED,
    Line,
    Mean,
    compare,
    compare_base,
    is_bound,
)
from pipeline.results.files import BASE_FILE, LATEX_FILE, REPORT_FILE, TABLE_FILE
from pipeline.results.results import (
    LOWER_IS_BETTER,
    METRIC_TITLES,
    RunResult,
    base_measures,
    base_title,
    entry_importances,
    evaluation_sets,
    labels,
    metric,
    metric_name,
    runs_by_method,
)
from pipeline.results.run_folder import read_result, read_trials, runs_in
from pipeline.results.templates import code, render, score
from pipeline.stages.files import METRICS
from pipeline.storage import bucket_of
from pipeline.storage.artifact import write_text

HEADLINE_METHODS = 4
MOST_EXAMPLES = 4
"""Methods whose answers are shown."""


def write_report(
    file: Path,
    runs: Sequence[RunResult],
    *,
    title: str,
    trials: Sequence[Mapping[str, Any]] = (),
) -> dict[str, str]:
    """Write the report on these runs to `file` atomically; return its figures as SVG, by name.

    Writes the table of metrics beside it, as CSV and as LaTeX, and what the base model still knows
    as CSV, if it was measured. `trials` are those of the search
    that found the run, one mapping each. Raises `ValueError` if there are no runs, or if they
    learned different tasks.
    """
    if not runs:
        raise ValueError("a report needs at least one run")
    tasks = list(runs[0].metrics["tasks"])
    for run in runs:
        if list(run.metrics["tasks"]) != tasks:
            raise ValueError(
                "a report compares runs over one sequence of tasks, "
                f"but got {', '.join(tasks)} and {', '.join(run.metrics['tasks'])}"
            )
    from pipeline.results.figures import draw  # Matplotlib takes a second to import.

    pictures = draw(runs)
    by_method = runs_by_method(runs)
    lines_of = metric_lines(runs)
    tables = [{"set": n, "lines": lines, "best": _best(lines)} for n, lines in lines_of.items()]
    page = render(
        "report.html.j2",
        escape=True,
        title=title,
        tasks=tasks,
        runs=dict(zip(labels(runs), runs, strict=True)),
        headline=headline(runs),
        facts=_facts(runs),
        trials=trials,
        examples={
            of.label: of.runs[0].examples for of in by_method[:MOST_EXAMPLES] if of.runs[0].examples
        },
        tables=tables,
        has_seeds=len(by_method) < len(runs),
        pictures=pictures,
        base=compare_base(runs),
        after_tasks=[f"After {task}" for task in tasks],
        base_title=base_title,
        lower_is_better=LOWER_IS_BETTER,
        without_entries=[
            group.label
            for group in by_method
            if any(run.importance for run in group.runs) and not entry_importances(group)
        ],
        checks={of.label: worst for of in by_method if (worst := worst_checks(of))},
        crowded=crowded(runs),
        metric_titles=METRIC_TITLES,
        metric=metric,
        baseline=BASELINE,
        is_bound=is_bound,
    )
    write_text(file, page)
    write_text(file.with_name(TABLE_FILE), _csv(lines_of))
    write_text(file.with_name(LATEX_FILE), _latex(lines_of))
    if any(map(base_measures, runs)):
        write_text(file.with_name(BASE_FILE), _base_csv(runs))
    return {picture.file: picture.svg for picture in pictures}


def metric_lines(runs: Sequence[RunResult]) -> dict[str, list[Line]]:
    """The table of metrics: by evaluation set, a line per method."""
    found = {name: compare(runs, name, list(METRIC_TITLES)) for name in evaluation_sets(runs)}
    return {name: lines for name, lines in found.items() if lines}


def _facts(runs: Sequence[RunResult]) -> dict[str, str]:
    """What was trained on what, when, and for how long: titles and values."""
    configs = [yaml12.parse(run.config_yaml) or {} for run in runs]
    seconds = {stage.fingerprint: stage.seconds for run in runs for stage in run.stages}
    dates = [run.finished for run in runs if run.finished]
    tasks = runs[0].metrics["tasks"]
    rows = sum(runs[0].rows.get(task, {}).get("train", {}).get("rows", 0) for task in tasks)
    weights = [f"{run.weights / 1e6:,.1f}M weights" for run in runs if run.weights]

    def of(section: str, key: str) -> list[str]:
        values = [config.get(section, {}).get(key) for config in configs]
        return [f"{v:g}" if isinstance(v, float) else str(v) for v in values if v is not None]

    found = {
        "Model": [*of("model", "path"), *weights],
        "Data": [
            *of("tasks", "format"),
            f"{len(tasks)} task{'s' * (len(tasks) > 1)}",
            f"{rows:,} training rows",
        ],
        "Learning rate": of("training", "learning_rate"),
        "Epochs": of("training", "epochs"),
        "Batch size": of("training", "batch_size"),
        "Seeds": [str(run.metrics["seed"]) for run in runs],
        "Finished": [time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(max(dates)))] if dates else [],
        "Compute time": [str(timedelta(seconds=round(sum(seconds.values()))))] if seconds else [],
    }
    return {title: ", ".join(dict.fromkeys(values)) for title, values in found.items() if values}


def _csv(tables: Mapping[str, Sequence[Line]]) -> str:
    names = [name for key in METRIC_TITLES for name in (metric_name(key), f"{metric_name(key)}_95")]
    out = StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow(["evaluation_set", "method", "seeds", *names])
    for name, lines in tables.items():
        for line in lines:
            found = [line.metrics.get(key) for key in METRIC_TITLES]
            numbers = [(of.mean, of.half_width) if of else (None, None) for of in found]
            table.writerow([name, line.group.label, len(line.group.runs), *chain(*numbers)])
    return out.getvalue()


def _base_csv(runs: Sequence[RunResult]) -> str:
    out = StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow(["method", "seed", "after_task", "measure", "value"])
    for run in runs:
        for measure, values in base_measures(run).items():
            for index, value in enumerate(values):
                of_run = (run.metrics["method"], run.metrics["seed"])
                table.writerow([*of_run, index, measure, value])
    return out.getvalue()


def _latex(tables: Mapping[str, Sequence[Line]]) -> str:
    """A table for the package booktabs."""
    rows = []
    for name, lines in tables.items():
        rows += [r"\midrule", rf"\multicolumn{{{len(METRIC_TITLES) + 1}}}{{l}}{{{_tex(name)}}} \\"]
        for line in lines:
            cells = [_tex_cell(line.metrics.get(key)) for key in METRIC_TITLES]
            rows.append(" & ".join([_tex(line.group.label), *cells]) + r" \\")
    head = " & ".join(["Method", *METRIC_TITLES.values()]) + r" \\"
    begin = rf"\begin{{tabular}}{{l{'r' * len(METRIC_TITLES)}}}"
    return "\n".join([begin, r"\toprule", head, *rows, r"\bottomrule", r"\end{tabular}", ""])


def _tex_cell(of: Mean | None) -> str:
    return f"${_cell(of)}$".replace("±", r"\pm") if of else "--"


def _tex(text: str) -> str:
    text = text.replace("\\", "/").replace("~", "-").replace("^", "")
    return re.sub(r"([#$%&_{}])", r"\\\1", text)


def description(runs: Sequence[RunResult]) -> str:
    """The headline and the table of metrics as Markdown."""
    parts = [headline(runs)]
    for name, lines in metric_lines(runs).items():
        parts.append(f"**{name}**\n")
        parts[-1] += f"\n| method | {' | '.join(METRIC_TITLES.values()).lower()} |"
        parts[-1] += "\n| --- |" + " --- |" * len(METRIC_TITLES)
        for line in lines:
            cells = [_cell(line.metrics.get(key)) for key in METRIC_TITLES]
            parts[-1] += f"\n| {' | '.join([code(line.group.label), *cells])} |"
    if base := compare_base(runs):
        parts.append(
            "**what the base model still knows**, before the first task → after the last\n"
        )
        parts[-1] += f"\n| method | {' | '.join(map(base_title, base))} |"
        parts[-1] += "\n| --- |" + " --- |" * len(base)
        for label in dict.fromkeys(chain(*base.values())):
            cells = [
                f"{score(of[label][0].mean)} → {_cell(of[label][-1])}" if label in of else "–"
                for of in base.values()
            ]
            parts[-1] += f"\n| {' | '.join([code(label), *cells])} |"
    return "\n\n".join(parts)


def _cell(of: Mean | None) -> str:
    spread = "" if of is None or of.half_width is None else f" ± {score(of.half_width)}"
    return score(of.mean if of else None) + spread


def numbers(runs: Sequence[RunResult]) -> dict[str, float]:
    """The table of metrics as `<evaluation set>/<method>/<metric>`; `_95`: its half width.

    Without set and method: the metrics of the best method on the main set.
    """
    best = by_average(runs)[0].metrics
    found = {metric_name(key): of.mean for key, of in best.items()}
    for name, lines in metric_lines(runs).items():
        for line in lines:
            for key, of in line.metrics.items():
                at = f"{name}/{line.group.label}/{metric_name(key)}"
                found[at] = of.mean
                if of.half_width is not None:
                    found[f"{at}_95"] = of.half_width
    return found


def base_numbers(runs: Sequence[RunResult]) -> list[dict[str, float]]:
    """What the base model still knows as `base/<method>/<measure>`, by `step`: 0, then each task.

    `_95`: the half width of an interval over seeds.
    """
    found: dict[int, dict[str, float]] = {}
    for measure, by_label in compare_base(runs).items():
        for label, rows in by_label.items():
            for step, row in enumerate(rows):
                record = found.setdefault(step, {"step": step})
                record[f"base/{label}/{measure}"] = row.mean
                if row.half_width is not None:
                    record[f"base/{label}/{measure}_95"] = row.half_width
    return list(found.values())


def by_average(runs: Sequence[RunResult]) -> list[Line]:
    """The methods' metrics on the main evaluation set, best average first, without bounds."""
    lines = next(iter(metric_lines(runs).values()))
    shown = [line for line in lines if not is_bound(line.group.label)] or lines
    return sorted(shown, key=lambda line: -line.metrics[COMPARED].mean)


def headline(runs: Sequence[RunResult]) -> str:
    """Say in one sentence what each method keeps of what it learned, best method first."""
    shown, num_tasks = by_average(runs), len(runs[0].metrics["tasks"])
    parts: list[str] = []
    for line in shown[:HEADLINE_METHODS]:
        seeds = len(line.group.runs)
        name = line.group.label + (f" ({seeds} seeds)" if seeds > 1 else "")
        kept, learned = _rounded(line, "average_performance"), _rounded(line, "learning_accuracy")
        if num_tasks == 1:
            parts.append(f"{name} scores {kept}" + ("" if parts else " after 1 task"))
        elif not parts:
            parts.append(
                f"{name} keeps {kept} of {learned} learned after {num_tasks} tasks "
                f"(backward transfer {_rounded(line, 'backward_transfer')})"
            )
        else:
            of = "" if learned == _rounded(shown[0], "learning_accuracy") else f" of {learned}"
            parts.append(f"{name} keeps {kept}{of} ({_rounded(line, 'backward_transfer')})")
    more = len(shown) - HEADLINE_METHODS
    return "; ".join(parts) + (f"; {more} more below." if more > 0 else ".")


def _rounded(line: Line, key: str) -> str:
    return score(line.metrics[key].mean, 2)


def _best(lines: Sequence[Line]) -> dict[str, str]:
    """The best score of each metric as it is shown, for metrics in which the methods differ."""
    best = {}
    for key in METRIC_TITLES:
        compared = [line.metrics.get(key) for line in lines if not is_bound(line.group.label)]
        scores = {score(each.mean) for each in compared if each}
        if len(scores) > 1:
            best[key] = (min if key in LOWER_IS_BETTER else max)(scores, key=float)
    return best


def rewrite_report(place: str) -> Path:
    """Write the report of a finished run, comparison or search again, and return its path.

    Reads the folder alone, so it works without the artifacts and after a new version of agcl.
    `place` is the folder or, in a bucket, its URI. Raises `InputError` if there is no finished run.
    """
    bucket, folder = bucket_of(place) if "://" in place else (None, Path(place).absolute())
    with bucket.results(folder) if bucket else nullcontext():
        results = [read_result(each) for each in runs_in(folder)]
        if len({tuple(each.metrics["tasks"]) for each in results}) > 1:
            raise InputError(f"{place}: holds runs of different tasks; name one of its folders")
        title = results[0].metrics["name"] if (folder / METRICS).is_file() else folder.name
        write_report(folder / REPORT_FILE, results, title=title, trials=read_trials(folder))
    return folder / REPORT_FILE
