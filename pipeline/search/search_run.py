"""From a config to a finished search: check, share, try, choose, and score the winner once."""

import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow.parquet as pq
from agcl.errors import InputError
from rich.console import Console

from pipeline.config import loading
from pipeline.config.config import Config
from pipeline.execution.cluster import check_address, cluster
from pipeline.execution.scheduler import run_with_progress
from pipeline.plan.plan import Run
from pipeline.plan.schedule import sessions
from pipeline.results.results import RunResult
from pipeline.results.run_folder import CONFIG_FILE, open_folder
from pipeline.run import execute, open_run
from pipeline.search import trial as trials
from pipeline.search.rounds import Observe
from pipeline.search.search import Search, run_trials, shared_stages
from pipeline.search.space import Settings, space_of
from pipeline.search.trial import Trial
from pipeline.search.tuning import VALIDATION
from pipeline.storage import artifact
from pipeline.tracking.sync import Mirror

SEARCH_FILE, TABLE, BEST_CONFIG, BEST = "search.yaml", "trials.parquet", "best.yaml", "best"
_STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


@dataclass(frozen=True)
class Found:
    """What a search found."""

    trials: Sequence[Trial]
    best: Trial | None
    """None where no trial reached the last task."""
    result: RunResult | None
    """The winner's, on test rows."""


def open_search(config: Config, num_trials: int, *, resume: bool) -> Search:
    """Check a search's config, space and input, and that its folder is free or its own.

    Writes nothing. Raises `InputError`; with `resume` also where there is nothing to go on with.
    """
    if config.method in ("joint", "solo"):
        raise InputError(f"method: {config.method} is a bound and no sequence; there is no search")
    settings: Settings = {"evaluation.rows": "validation"}
    if not config.evaluation.validation:
        settings["evaluation.validation"] = VALIDATION
    of_trials = loading.changed(config, settings)
    space = space_of(of_trials)
    search = Search(of_trials, space, num_trials, config.storage.root / f"{config.name}-search")
    if len(_tasks(search)) < 2 and config.search.objective != "average":
        raise InputError("search.objective: one task alone has nothing to retain")
    _check_folder(search, resume=resume)
    return search


def _tasks(search: Search) -> Sequence[str]:
    return open_run(search.config, search.folder / "trials").plan.tasks


def _check_folder(search: Search, *, resume: bool) -> None:
    """A search folder keeps one search: trials of another one say nothing about this one's."""
    file = search.folder / SEARCH_FILE
    search.config.storage.refresh(file)
    if not file.is_file():
        if resume:
            raise InputError(f"--resume: {search.folder} holds no search to go on with")
        return
    try:
        stored = loading.load(file)
    except InputError as error:
        raise InputError(f"{file}: {error}; delete that folder to search again") from None
    for section in Config.model_fields:
        same = getattr(stored, section) == getattr(search.config, section)
        if section not in ("resources", "tracking") and not same:
            place = search.config.storage.place(search.folder)
            raise InputError(
                f"name: {place} holds a search with another {section!r} section; choose "
                f"another name (name={search.config.name}-2) or delete that folder. Finished "
                "stages are shared."
            )


def execute_search(
    search: Search, *, command: str, console: Console, watch: AbstractContextManager[Observe]
) -> Found:
    """Run a search: what all trials share, the trials, and the best one on test rows.

    `watch`, entered while the trials run, gets each whenever its record changes. Raises
    `StageFailed` for a stage that all trials need.
    """
    config = search.config
    check_address()
    mirror = Mirror(config, search.folder, search.folder.name, console, kind="search")
    with config.storage.results(search.folder), mirror:
        return _execute(search, mirror, command, console, watch)


def _execute(
    search: Search,
    mirror: Mirror,
    command: str,
    console: Console,
    watch: AbstractContextManager[Observe],
) -> Found:
    config = search.config
    artifact.write_text(search.folder / SEARCH_FILE, loading.dump(config))
    config.storage.save_results(search.folder)
    shared = shared_stages(search)
    todo = sessions({"all trials": shared}, config.storage)
    records = _Records(search, mirror, {stage.name for stage in shared})

    console.print(
        f"  {sum(len(s.stages) for s in todo)} of {len(shared)} stages that all trials share to "
        "run; starting Ray",
        highlight=False,
    )
    with cluster(config.resources) as side_by_side:
        failures = run_with_progress(
            todo,
            search.folder,
            config.resources,
            lambda _: None,
            console,
            side_by_side=side_by_side,
        )
        if failures:
            failures[0].log = search.folder / "error.log"
            artifact.write_text(failures[0].log, failures[0].traceback)
            raise failures[0]
        with watch as observe:

            def on_change(trial: Trial) -> None:
                observe(trial)
                records.observe(trial)

            found = run_trials(search, side_by_side, on_change)
    mirror.sync(now=True)
    pq.write_table(trials.table(found), search.folder / TABLE)
    best = trials.best(found)
    result = _score(search, best, mirror, command, console) if best else None
    _finish(search, found, best, mirror)
    return Found(found, best, result)


class _Records:
    """The MLflow side: a run for every trial, with the stages that only it has below."""

    def __init__(self, search: Search, mirror: Mirror, shared: set[str]) -> None:
        self.search, self.mirror, self.shared = search, mirror, shared
        self.opened: set[int] = set()

    def observe(self, trial: Trial) -> None:
        label = f"trial-{trial.number}"
        if trial.number not in self.opened:
            self.opened.add(trial.number)
            try:
                run = self.search.run_of(trial)
            except InputError:
                return  # No valid config, so nothing to record but the table's row.
            open_folder(run)
            self.mirror.add(label, run, kind="trial", without=self.shared)
        else:
            self.mirror.sync(label)
        if trial.state != "running":
            scores = (
                {k: v for k, v in asdict(trial.last).items() if v is not None} if trial.last else {}
            )
            self.mirror.end(label, scores, status=_STATUS[trial.state], error=trial.reason or "")


def _score(
    search: Search, best: Trial, mirror: Mirror, command: str, console: Console
) -> RunResult:
    """Write the winner's config and run it: trained already, it is scored on the test rows."""
    run = best_run(search, best)
    artifact.write_text(search.folder / BEST_CONFIG, loading.dump(run.config))
    (result,) = execute(
        {BEST: run}, run.folder, title=BEST, command=command, console=console, above=mirror.own
    )
    return result


def best_run(search: Search, best: Trial) -> Run:
    """The winner as an ordinary run, its test rows scored too."""
    settings = {**best.settings, "evaluation.rows": "all", "name": f"{search.config.name}-best"}
    config = loading.changed(search.config, settings)
    _forget_another(search, loading.dump(config))
    return open_run(config, search.folder / BEST)


def _forget_another(search: Search, winner: str) -> None:
    """Of more trials another one may win; what the earlier winner left is copies and links."""
    file, folder = search.folder / BEST_CONFIG, search.folder / BEST
    if not file.is_file() or file.read_text(encoding="utf-8") == winner:
        return
    search.config.storage.forget(folder / CONFIG_FILE)
    shutil.rmtree(folder, ignore_errors=True)


def _finish(search: Search, found: Sequence[Trial], best: Trial | None, mirror: Mirror) -> None:
    """Draw the figures, and give everything to MLflow."""
    from pipeline.search.figures import search_figures

    pictures = search_figures(search.space, found, best)
    for name, png in pictures.items():
        (search.folder / "figures").mkdir(exist_ok=True)
        (search.folder / "figures" / name).write_bytes(png)
    names = [TABLE, SEARCH_FILE, *([BEST_CONFIG] if best else [])]
    files: dict[str, Any] = {name: search.folder / name for name in names}
    files |= {f"figures/{name}": png for name, png in pictures.items()}
    scores: Mapping[str, float] = {}
    if best and best.last:
        scores = {f"best_{k}": v for k, v in asdict(best.last).items() if v is not None}
    mirror.finish(files, scores)
