"""The main path, from a config to a finished run.

`open_run` checks the config and resolves its stages, `execute` runs what is missing and writes the
results. Nothing here depends on what a stage does.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from agcl.errors import InputError
from rich.console import Console

from pipeline.config.check import check_inputs
from pipeline.config.config import Config
from pipeline.config.resources import Resources
from pipeline.config.revision import pinned
from pipeline.errors import StageFailed
from pipeline.execution.cluster import check_address
from pipeline.execution.progress import warn
from pipeline.execution.scheduler import run_with_progress
from pipeline.plan.plan import Run, plan
from pipeline.plan.schedule import sessions
from pipeline.plan.stage import complete, resolve
from pipeline.results.checks import crowded
from pipeline.results.model_card import write_model_folder
from pipeline.results.report import (
    BASE_FILE,
    TABLE_FILE,
    by_average,
    description,
    numbers,
    write_report,
)
from pipeline.results.results import RunResult, groups, left_out
from pipeline.results.run_folder import (
    CONFIG_FILE,
    check_folder,
    open_folder,
    read_result,
    read_trials,
    runs_in,
    write_log,
    write_results,
    write_runs,
)
from pipeline.stages.files import METRICS
from pipeline.stages.prepare import make_tokenizer, prepare
from pipeline.storage import artifact, bucket_of
from pipeline.tracking.sync import Mirror
from pipeline.tracking.tracker import Content

REPORT_FILE = "report.html"
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
    above: str | None = None,
) -> list[RunResult]:
    """Run the unfinished stages of all runs; write each run's results and one report on all.

    Up to `REPORTS_EACH` runs also get a report of their own. `above` is the id of the parent
    MLflow run, if any.

    Raises `StageFailed`; finished stages are kept and not computed again.
    """
    config = next(iter(runs.values())).config  # Storage, resources and tracking are those of all.
    kind = "comparison" if len(runs) > 1 else None
    with mirrored(config, folder, title, console, kind=kind, above=above) as mirror:
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
            write_runs(folder, [run.folder for run in runs.values()])
            figures = write_report(folder / REPORT_FILE, results, title=title)
            mirror.finish(
                files_for_mlflow(folder, figures),
                numbers(results),
                tags={
                    "method": f"{by_average(results)[0].group.label} (best)",
                    "methods": ", ".join(group.label for group in groups(results)),
                    "seeds": ", ".join(dict.fromkeys(str(r.metrics["seed"]) for r in results)),
                },
                params=shared_settings([run.config for run in runs.values()]),
                note=description(results),
            )
        return results


def shared_settings(configs: Sequence[Config]) -> dict[str, Any]:
    """The config's sections that are the same in all configs."""
    first, *others = [config.model_dump(mode="json") for config in configs]
    return {key: of for key, of in first.items() if all(other[key] == of for other in others)}


@contextmanager
def mirrored(
    config: Config,
    folder: Path,
    title: str,
    console: Console,
    *,
    kind: str | None,
    above: str | None = None,
) -> Iterator[Mirror]:
    """Lock a folder against other commands, mirror it in MLflow, and save it on exit.

    Waits while another command holds the lock.
    """
    check_address()
    mirror = Mirror(config, folder, title, console, kind=kind, above=above)
    with locked(folder, console), config.storage.results(folder), mirror:
        yield mirror


def locked(folder: Path, console: Console) -> AbstractContextManager[None]:
    """Lock a folder against other commands. Waits, and says so, while one of them holds it."""
    waiting = f"  waiting for another command that works on {folder}"
    on_wait = partial(console.print, waiting, highlight=False, soft_wrap=True, markup=False)
    return artifact.claimed(folder, on_wait)


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


def files_for_mlflow(folder: Path, figures: Mapping[str, str]) -> dict[str, Content]:
    """The results and figures of a folder to upload to MLflow, by artifact path."""
    names = (METRICS, REPORT_FILE, TABLE_FILE, BASE_FILE)
    files: dict[str, Content] = {name: folder / name for name in names if (folder / name).exists()}
    return files | {f"figures/{name}": svg for name, svg in figures.items()}


def prepare_tasks(run: Run, console: Console) -> None:
    """Prepare the run's tasks that are not prepared yet, and run no other stage.

    Raises `StageFailed`.
    """
    run.config.storage.check_writable()
    stages = [stage for stage in run.plan.stages if stage.fn in (prepare, make_tokenizer)]
    todo = sessions({run.config.name: stages}, run.config.storage)
    # Not the run's own folder, where `agcl run` may have workers at the same time.
    aside = run.folder / ".tasks"
    # Not the run's resources: one process tokenizes, without the GPUs, which may be elsewhere.
    failures = run_with_progress(todo, aside, Resources(), lambda records: None, console)
    for failure in failures:
        write_log(run.folder, failure)
        raise failure


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
