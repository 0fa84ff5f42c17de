"""The main path, from a config to a finished run.

`open_run` checks the config and resolves its stages, `execute` runs what is missing and writes the
results. Nothing here depends on what a stage does.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.config.check import check_inputs
from pipeline.config.config import Config
from pipeline.config.revision import pinned
from pipeline.errors import StageFailed
from pipeline.execution.progress import warn
from pipeline.execution.scheduler import run_with_progress
from pipeline.plan.plan import Run, plan
from pipeline.plan.schedule import sessions
from pipeline.plan.stage import complete, resolve
from pipeline.results.checks import crowded
from pipeline.results.files import CONFIG_FILE, REPORT_FILE
from pipeline.results.model_card import write_model_folder
from pipeline.results.report import base_numbers, by_average, description, numbers, write_report
from pipeline.results.results import RunResult, left_out, runs_by_method
from pipeline.results.run_folder import (
    check_folder,
    open_folder,
    write_log,
    write_results,
    write_runs,
)
from pipeline.tracking.sync import Mirror, files_for_mlflow, mirrored

REPORTS_EACH = 4
"""With more runs than this only the report on all is written; each takes seconds."""


def open_run(
    config: Config, folder: Path | None = None, *, weights: bool = True, devices: bool = True
) -> Run:
    """Check a config's inputs and resolve its stages. Writes nothing but caches.

    Downloads a model on the hub, at the commit that an earlier run in the folder started with. With
    `weights=False`, the model folder may lack its weights; fingerprints then do not cover them.
    With `devices=False`, this machine may lack the GPUs and packages that running the stages needs.
    Raises `InputError` for bad input, and if the folder holds a run of another config.
    """
    folder = folder or config.storage.root / config.name
    config.storage.check()
    config = pinned(config, [folder / CONFIG_FILE])
    check_inputs(config, weights=weights, devices=devices)
    check_folder(config, folder / CONFIG_FILE)
    planned = plan(config)
    return Run(config, folder, planned, resolve(planned.stages, config.storage))


def execute(
    runs: Mapping[str, Run],
    folder: Path,
    *,
    title: str,
    command: str,
    console: Console,
    parent_id: str | None = None,
) -> list[RunResult]:
    """Run the unfinished stages of all runs; write each run's results and one report on all.

    Up to `REPORTS_EACH` runs also get a report of their own. `parent_id` is the id of the parent
    MLflow run, if any.

    Raises `StageFailed`; finished stages are kept and not computed again.
    """
    config = next(iter(runs.values())).config  # Storage, resources and tracking are those of all.
    kind = "comparison" if len(runs) > 1 else None
    with mirrored(config, folder, title, console, kind=kind, parent_id=parent_id) as mirror:
        done_before = complete(s for run in runs.values() for s in run.resolved.values())
        _run_missing(runs, config, folder, mirror, console)
        results = [write_results(run, command, done_before) for run in runs.values()]
        lost = dict.fromkeys(line for result in results for line in left_out(result.rows))
        for line in (*lost, *crowded(results)):
            warn(console, line)
        for (label, run), result in zip(runs.items(), results, strict=True):
            figures: dict[str, str] = {}
            if len(runs) <= REPORTS_EACH:
                file = run.folder / REPORT_FILE
                figures = write_report(file, [result], title=result.metrics["name"])
            write_model_folder(run, result, mirror.run_of(label))
            files = files_for_mlflow(run.folder, figures)
            mirror.finish_run(label, result.metrics, files, note=description([result]))
        if [run.folder for run in runs.values()] != [folder]:  # A comparison, also of one run.
            _finish_comparison(runs, results, folder, title, mirror)
        return results


def _run_missing(
    runs: Mapping[str, Run], config: Config, folder: Path, mirror: Mirror, console: Console
) -> None:
    """Open the runs' folders and run their unfinished stages. Raises `StageFailed`."""
    todo = sessions({label: run.plan.stages for label, run in runs.items()}, config.storage)
    for label, run in runs.items():
        # Again: we may have waited for another command.
        check_folder(run.config, run.folder / CONFIG_FILE)
        open_folder(run)
        mirror.add(label, run)
    config.storage.save_results(folder)  # Other machines then know of the run if it is killed.
    try:
        failures = run_with_progress(todo, folder, config.resources, mirror.observe, console)
    except StageFailed as of_all:
        failures = [of_all]
    for failure in failures:
        write_log(folder, failure)
    if failures:
        raise failures[0]
    mirror.sync(now=True)


def _finish_comparison(
    runs: Mapping[str, Run], results: Sequence[RunResult], folder: Path, title: str, mirror: Mirror
) -> None:
    """Write one report on all runs, and finish the MLflow run above theirs."""
    write_runs(folder, [run.folder for run in runs.values()])
    figures = write_report(folder / REPORT_FILE, results, title=title)
    mirror.finish(
        files_for_mlflow(folder, figures),
        [numbers(results), *base_numbers(results)],
        tags={
            "method": f"{by_average(results)[0].group.label} (best)",
            "methods": ", ".join(group.label for group in runs_by_method(results)),
            "seeds": ", ".join(dict.fromkeys(str(r.metrics["seed"]) for r in results)),
        },
        params=_shared_settings([run.config for run in runs.values()]),
        note=description(results),
    )


def _shared_settings(configs: Sequence[Config]) -> dict[str, Any]:
    """The config's sections that are the same in all configs."""
    first, *others = [config.model_dump(mode="json") for config in configs]
    return {key: of for key, of in first.items() if all(other[key] == of for other in others)}
