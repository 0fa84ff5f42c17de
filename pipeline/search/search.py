"""From a config to a finished search: check, run the shared stages, try, score the best once."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from agcl.errors import InputError
from rich.console import Console

from pipeline.config import loading
from pipeline.config.config import Config
from pipeline.config.method import METHOD_SECTIONS
from pipeline.config.presets import BOUNDS
from pipeline.config.revision import pinned
from pipeline.config.search import Dimension
from pipeline.errors import StageFailed
from pipeline.execution.cluster import cluster
from pipeline.execution.scheduler import run_with_progress
from pipeline.plan.plan import Run
from pipeline.plan.schedule import sessions
from pipeline.results.files import BEST, REPORT_FILE, SEARCH_FILE
from pipeline.results.report import write_report
from pipeline.results.results import RunResult
from pipeline.results.run_folder import (
    check_folder,
    open_folder,
    read_trials,
    write_runs,
    write_trials,
)
from pipeline.run import open_run
from pipeline.search import trial as trials
from pipeline.search.best import BEST_SUFFIX, finish_search, score_best
from pipeline.search.engine import Observe, Search, run_trials
from pipeline.search.space import Settings, corners, own_point, space_of
from pipeline.search.trial import Trial, scores_of
from pipeline.storage import artifact
from pipeline.tracking.sync import Mirror, mirrored

VALIDATION_SHARE = 0.3
"""Share of the scored rows to choose settings by, if the config sets none."""
_MOST_CORNERS = 256
"""Pairs of opposite points to try, where values of several keys exclude each other."""
_STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


@dataclass(frozen=True)
class SearchResult:
    """The result of a search."""

    trials: Sequence[Trial]
    best: Trial | None
    """None if no trial reached the last task."""
    result: RunResult | None
    """The best trial's, on test rows."""


def open_search(config: Config, num_trials: int, *, resume: bool) -> Search:
    """Check a search's config, space and input, and that its folder is free or its own.

    Writes nothing. Raises `InputError`; with `resume` also if there is no search to resume.
    """
    if config.method in BOUNDS:
        raise InputError(f"method: {config.method} is an upper bound, which is not searched")
    folder = config.storage.root / f"{config.name}-search"
    config = only_validation(pinned(config, [folder / SEARCH_FILE]))
    loading.changed(config, {"name": f"{config.name}{BEST_SUFFIX}"})  # A name may be too long.
    space = space_of(config)
    search = Search(config, folder, num_trials, space)
    if keeps_base(search):
        _check_keeps_base(config, space)
    num_tasks = len(open_run(config, search.folder / "trials").plan.tasks)
    if num_tasks < 2 and config.search.objective == "retained_and_learned":
        raise InputError("search.objective: one task alone has nothing to retain")
    # Trials of another search are not comparable with these.
    file = search.folder / SEARCH_FILE
    check_folder(config, file, "search")
    if resume and not file.is_file():
        raise InputError(f"--resume: {search.folder} holds no search to resume")
    return search


def _check_keeps_base(config: Config, space: Mapping[str, Dimension]) -> None:
    """Refuse what would leave the best trial without the score that it must reach."""
    if not (config.model.is_builtin or config.evaluation.text):
        raise InputError(
            "search.objective: base_and_average needs evaluation.text, a text to measure what "
            "the base model still knows"
        )
    if own_point(config, space) is None:
        raise InputError(
            "search.objective: base_and_average compares with the config's own settings, and "
            "search.space does not contain them"
        )
    if config.search.stopping != "none":  # By the average alone, after a task.
        raise InputError(
            f"search.stopping: {config.search.stopping} could stop the config's own settings, with "
            "which base_and_average compares; choose none"
        )


def keeps_base(search: Search) -> bool:
    """Whether the best trial must keep as much of the base model as the config's own settings."""
    return search.config.search.objective == "base_and_average"


def only_validation(config: Config) -> Config:
    """The config of trials: validation rows are set apart, and no others are scored."""
    settings: Settings = {"evaluation.rows": "validation"}
    if not config.evaluation.validation:
        settings["evaluation.validation"] = VALIDATION_SHARE
    return loading.changed(config, settings)


def execute_search(
    search: Search, *, command: str, console: Console, watch: AbstractContextManager[Observe]
) -> SearchResult:
    """Run a search: the stages that all trials share, the trials, and the best on test rows.

    `watch`, entered while the trials run, is called with each trial whenever it changes. Raises
    `StageFailed` for a stage that all trials need.
    """
    with mirrored_search(search, console) as mirror:
        found = execute_trials(search, mirror, console, watch)
        best = trials.best(found, keep_base=keeps_base(search))
        result = score_best(search, best, mirror, command, console) if best else None
        if result:
            write_runs(search.folder, [search.folder / BEST])
            file, tried = search.folder / REPORT_FILE, read_trials(search.folder)
            write_report(file, [result], title=search.folder.name, trials=tried)
        finish_search(search, found, best, result, mirror)
        return SearchResult(found, best, result)


def mirrored_search(search: Search, console: Console) -> AbstractContextManager[Mirror]:
    """`mirrored` for a search's folder."""
    title = search.folder.relative_to(search.config.storage.root).as_posix().replace("/", "-")
    return mirrored(search.config, search.folder, title, console, kind="search")


def execute_trials(
    search: Search, mirror: Mirror, console: Console, watch: AbstractContextManager[Observe]
) -> list[Trial]:
    """Run all trials on one Ray cluster, after the stages that they share.

    Raises `StageFailed` for a stage that all trials need, `InputError` if the folder is of another
    search by now.
    """
    config = search.config
    claim_folder(search)  # Again: we may have waited for another search, which then owns it.
    config.storage.save_results(search.folder)  # The search is known even if it is killed.
    runs = example_runs(search)
    shared = in_several(runs)
    plans = {
        label: [s for s in run.plan.stages if run.resolved[s.name].folder.name in shared]
        for label, run in runs.items()
    }
    todo = sessions(plans, config.storage)
    missing = sum(len(session.stages) for session in todo)
    console.print(f"  stages to run that trials share: {missing}; starting Ray", highlight=False)
    with cluster(config.resources) as side_by_side:
        failures = run_with_progress(
            todo,
            search.folder,
            config.resources,
            lambda _: None,
            console,
            side_by_side=side_by_side,
            keep_going=bool(search.known),
        )
        _raise_common(failures, runs, search.folder)
        with watch as observe:
            record = _recorder(search, mirror, shared)

            def on_change(trial: Trial) -> None:
                observe(trial)
                record(trial)

            found = run_trials(search, shared, side_by_side, on_change)
    mirror.sync(now=True)
    write_trials(search.folder, trials.table(found))
    return found


def claim_folder(search: Search) -> None:
    """Write the search's config into its folder. Raises `InputError` if another one's is there.

    Trials that are known beforehand are those of several methods. The config is that of the first,
    whichever that is, so only what all methods share is compared.
    """
    free = ("method", *METHOD_SECTIONS) if search.known else ()
    file = search.folder / SEARCH_FILE
    check_folder(search.config, file, "search", tuned=free)
    artifact.write_text(file, loading.dump(search.config))


def example_runs(search: Search) -> dict[str, Run]:
    """Runs that show what trials share: all that are known, else two opposite points."""
    if search.known:
        points = [settings for settings, _ in search.known.values()]
        runs = [search.run_of(number, settings) for number, settings in enumerate(points)]
        return {run.folder.name: run for run in runs}
    first: InputError | None = None
    for pair in islice(corners(search.space), _MOST_CORNERS):
        try:
            one, other = (search.run_of(0, settings) for settings in pair)
        except InputError as error:
            first = first or error
        else:
            return {"one": one, "other": other}
    raise InputError(f"search.space: its values cannot be combined: {first}")


def _artifacts(run: Run) -> set[str]:
    return {stage.folder.name for stage in run.resolved.values()}


def in_several(runs: Mapping[str, Run]) -> set[str]:
    """The artifacts that more than one run needs."""
    count = Counter(name for run in runs.values() for name in _artifacts(run))
    return {name for name, times in count.items() if times > 1}


def _raise_common(failures: Sequence[StageFailed], runs: Mapping[str, Run], folder: Path) -> None:
    """Raise the failure of a stage that all trials need.

    Any other will fail again in each trial that needs it, and be recorded there.
    """
    common = set.intersection(*map(_artifacts, runs.values()))
    first = next(iter(runs.values())).resolved
    for failure in failures:
        if failure.stage in first and first[failure.stage].folder.name in common:
            with suppress(OSError):  # The disk may be full; why the stage failed says more.
                artifact.write_text(folder / "error.log", failure.traceback)
                failure.log = folder / "error.log"
            raise failure


def _recorder(search: Search, mirror: Mirror, shared: Collection[str]) -> Observe:
    """The MLflow side: a child run per trial, with the stages that only this trial has."""
    opened: set[int] = set()

    def record(trial: Trial) -> None:
        label = search.label(trial.number)
        if trial.number in opened:
            mirror.sync(label)
        else:
            try:
                run = search.run_of(trial.number, trial.settings)
            except InputError:
                return  # Not a valid config: only the table has it.
            opened.add(trial.number)
            open_folder(run)
            without = {n for n, s in run.resolved.items() if s.folder.name in shared}
            mirror.add(label, run, kind="trial", without=without)
        if trial.state != "running":
            status = _STATUS[trial.state]
            mirror.end(label, scores_of(trial), status=status, error=trial.reason or "")

    return record
