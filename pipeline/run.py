"""From configs to finished runs: check, plan, run what is missing, write results and report."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

from agcl.errors import InputError
from rich.console import Console
from rich.markup import escape

from pipeline.config import loading
from pipeline.config.check import check_inputs
from pipeline.config.config import Config
from pipeline.errors import StageFailed
from pipeline.execution.cluster import check_address
from pipeline.execution.scheduler import run_with_progress
from pipeline.plan.plan import Run, plan
from pipeline.plan.stage import Work, resolve, sessions
from pipeline.results.model_card import MODEL, write_model_folder
from pipeline.results.report import write_report
from pipeline.results.results import RunResult, left_out
from pipeline.results.run_folder import (
    CONFIG_FILE,
    check_folder,
    open_folder,
    write_log,
    write_results,
)
from pipeline.stages.files import METRICS
from pipeline.stages.prepare import make_tokenizer, prepare
from pipeline.storage import artifact, mirror, object_store
from pipeline.tracking.client import Content, Tracker
from pipeline.tracking.recorder import Recording, connect, open_recording, warn

REPORT_FILE = "report.html"
REPORTS_EACH = 4
"""With more runs than this only the report on all is written; each takes seconds."""


def open_run(config: Config, folder: Path | None = None) -> Run:
    """Check a config's inputs and resolve its stages. Writes nothing but an object store's cache.

    Raises `InputError` for bad input, and for a folder that holds a run of another config.
    """
    local = config.local_storage
    folder = folder or local / config.name
    there = next(path for path in (local, *local.parents) if path.exists())
    if not there.is_dir():
        raise InputError(f"storage: {there} is not a folder")
    if isinstance(config.storage, str):
        object_store.check(config.storage)
    mirror.pull_file(config.storage, folder / CONFIG_FILE)
    check_folder(config, folder)
    check_inputs(config)
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
    """Run what is missing of every run, write their results, and one report on all.

    Up to `REPORTS_EACH` runs get a report of their own too. `above` is the MLflow run that they
    belong to, if any.

    Raises `StageFailed`; what was finished by then is kept and not computed again.
    """
    config = _any_config(runs)
    check_address()
    tracker = connect(config, console)
    with _alone(folder, console), mirror.results(config.storage, folder):
        return _execute(runs, folder, tracker, title, command, console, above)


def _execute(
    runs: Mapping[str, Run],
    folder: Path,
    tracker: Tracker | None,
    title: str,
    command: str,
    console: Console,
    above: str | None,
) -> list[RunResult]:
    done_before = _complete(runs)
    recording, _ = _run_missing(runs, folder, tracker, title, console, above=above)
    results = [write_results(run, command, done_before) for run in runs.values()]
    for line in dict.fromkeys(line for result in results for line in left_out(result)):
        warn(console, line)
    for label, result in zip(runs, results, strict=True):
        file = runs[label].folder / REPORT_FILE
        pictures = {}
        if len(runs) <= REPORTS_EACH:
            pictures = write_report(file, [result], title=result.metrics["name"])
        run = runs[label]
        final = run.works[run.plan.final_model]
        if run.config.tracking.register_model:
            final.fetch()
        mlflow_run = recording.run_of(label)
        write_model_folder(run.folder / MODEL, final, run.config, result, mlflow_run)
        recording.finish_run(label, result.metrics, _artifacts(file.parent, pictures))
    if len(runs) > 1:
        pictures = write_report(folder / REPORT_FILE, results, title=title)
        recording.finish(_artifacts(folder, pictures))
    return results


def execute_trials(
    runs: Mapping[str, Run], folder: Path, *, title: str, command: str, console: Console
) -> dict[str, RunResult]:
    """Run what is missing of every run and give the results of those that did not fail.

    A failed run does not end the others. Writes no reports.
    """
    config = _any_config(runs)
    check_address()
    tracker = connect(config, console)
    with _alone(folder, console), mirror.results(config.storage, folder):
        done_before = _complete(runs)
        recording, failures = _run_missing(runs, folder, tracker, title, console, keep_going=True)
        for failure in failures:
            console.print(f"  [yellow]failed trial[/] {escape(str(failure))}", highlight=False)
        results = {
            label: write_results(run, command, done_before)
            for label, run in runs.items()
            if run.works["report"].is_complete()
        }
        for label, result in results.items():
            recording.finish_run(label, result.metrics, _artifacts(runs[label].folder, {}))
        recording.finish({})
        return results


def _any_config(runs: Mapping[str, Run]) -> Config:
    """Storage, resources and tracking are the same for all."""
    return next(iter(runs.values())).config


def _alone(folder: Path, console: Console) -> AbstractContextManager[None]:
    """Keep other commands out of a folder; wait for the one that is at work on it."""
    said = f"  waiting for another command that is at work on {escape(str(folder))}"
    return artifact.claimed(folder, lambda: console.print(said, highlight=False, soft_wrap=True))


def _artifacts(folder: Path, pictures: Mapping[str, bytes]) -> dict[str, Content]:
    files: dict[str, Content] = {
        name: folder / name for name in (METRICS, REPORT_FILE) if (folder / name).exists()
    }
    return files | {f"figures/{name}": png for name, png in pictures.items()}


def _complete(runs: Mapping[str, Run]) -> set[Path]:
    works = {work.folder: work for run in runs.values() for work in run.works.values()}
    with ThreadPoolExecutor() as pool:  # An object store takes its time for each.
        done = list(pool.map(Work.is_complete, works.values()))
    return {folder for folder, is_done in zip(works, done, strict=True) if is_done}


def _run_missing(
    runs: Mapping[str, Run],
    folder: Path,
    tracker: Tracker | None,
    title: str,
    console: Console,
    *,
    keep_going: bool = False,
    above: str | None = None,
) -> tuple[Recording, list[StageFailed]]:
    """Open the runs' folders and run their unfinished stages; raises `StageFailed`."""
    first = _any_config(runs)
    todo = sessions({label: run.plan.stages for label, run in runs.items()}, first.storage)
    kind = "comparison" if len(runs) > 1 else None
    recording = open_recording(tracker, folder, title, console, kind=kind, above=above)
    for label, run in runs.items():
        check_folder(run.config, run.folder)  # Again: we may have waited for another.
        open_folder(run)
        recording.add(label, run, name=label if len(runs) > 1 else title)
    mirror.push_results(first.storage, folder)  # A killed one is then known to other machines.
    try:
        try:
            failures = run_with_progress(
                todo, folder, first.resources, recording.observe, console, keep_going=keep_going
            )
        except StageFailed as of_all:
            failures, keep_going = [of_all], False
        for failure in failures:
            write_log(folder, failure)
        if failures and not keep_going:
            raise failures[0]
        recording.try_again(now=True)
    except BaseException as error:
        recording.abort("FAILED" if isinstance(error, Exception) else "KILLED", str(error))
        raise
    return recording, failures


def prepare_tasks(run: Run, console: Console) -> None:
    """Prepare the run's tasks, as far as they are not; its other stages are left alone.

    Raises `StageFailed`.
    """
    stages = [stage for stage in run.plan.stages if stage.fn in (prepare, make_tokenizer)]
    todo = sessions({run.config.name: stages}, run.config.storage)
    failures = run_with_progress(
        todo, run.folder, run.config.resources, lambda records: None, console
    )
    for failure in failures:
        write_log(run.folder, failure)
        raise failure


def rewrite_report(place: Path | str, command: str) -> Path:
    """Write the report of a finished run's or comparison's folder again; the report's path.

    The folder may be one of an object store. Raises `InputError` where it holds no finished run.
    """
    if isinstance(place, Path):
        return _rewrite_report(place, command, None)
    storage, folder = mirror.split(place)
    with mirror.results(storage, folder):
        return _rewrite_report(folder, command, storage)


def _rewrite_report(folder: Path, command: str, storage: str | None) -> Path:
    inner = sorted(f.parent for f in folder.glob(f"*/{CONFIG_FILE}") if not f.parent.is_symlink())
    folders = [folder] if (folder / METRICS).is_file() else inner
    if not folders:
        raise InputError(f"{folder}: no finished run (no {METRICS}) in this folder")
    results = []
    for one in folders:
        config = loading.load(one / CONFIG_FILE)
        config = config.model_copy(update={"storage": storage or config.storage})
        run = open_run(config, one)
        unfinished = [stage for stage, work in run.works.items() if not work.is_complete()]
        if "report" in unfinished:
            raise InputError(f"{one}: its artifacts are gone ({', '.join(unfinished)})")
        results.append(write_results(run, command, {work.folder for work in run.works.values()}))
    write_report(folder / REPORT_FILE, results, title=folder.name)
    return folder / REPORT_FILE
