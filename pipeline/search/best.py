"""What becomes of a search's best trial: a run that is scored on test rows, figures, MLflow."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from pipeline.config import loading
from pipeline.config.config import Config
from pipeline.plan.plan import Run
from pipeline.results.files import BEST, BEST_CONFIG, REPORT_FILE, SEARCH_FILE, TRIALS_FILE
from pipeline.results.report import base_numbers, numbers
from pipeline.results.results import RunResult
from pipeline.results.run_folder import FREE
from pipeline.run import execute, open_run
from pipeline.search.engine import Search
from pipeline.search.trial import Trial, scores_of, why_none
from pipeline.storage import artifact
from pipeline.tracking.sync import Mirror

BEST_SUFFIX = "-best"
"""What the name of the best trial's run ends in."""


def score_best(
    search: Search, best: Trial, mirror: Mirror, command: str, console: Console
) -> RunResult:
    """Write the best trial's config and run it: all is trained, so it only scores test rows."""
    run = best_run(search, best)
    artifact.write_text(search.folder / BEST_CONFIG, loading.dump(run.config))
    (result,) = execute(
        {BEST: run},
        run.folder,
        title=BEST,
        command=command,
        console=console,
        parent_id=mirror.run_id,
    )
    return result


def best_run(search: Search, best: Trial) -> Run:
    """The best trial as an ordinary run, which scores test rows too."""
    settings = {
        **best.settings,
        "evaluation.rows": "all",
        "name": f"{search.config.name}{BEST_SUFFIX}",
    }
    config = loading.changed(search.config, settings)
    file, folder = search.folder / BEST_CONFIG, search.folder / BEST
    if file.is_file() and _results_of(loading.load(file)) != _results_of(config):
        # More trials can change the winner. The old winner's folder holds only copies and links.
        config.storage.delete_folder(folder)
    return open_run(config, folder)


def _results_of(config: Config) -> dict[str, Any]:
    """The settings that decide results."""
    return dict(loading.leaves(config, exclude=FREE["run"]))


def finish_search(
    search: Search,
    found: Sequence[Trial],
    best: Trial | None,
    result: RunResult | None,
    mirror: Mirror,
) -> None:
    """Draw the figures, and give everything to MLflow."""
    from pipeline.search.figures import search_figures

    pictures = search_figures(search.space, found)
    for name, png in pictures.items():
        (search.folder / "figures").mkdir(exist_ok=True)
        (search.folder / "figures" / name).write_bytes(png)
    names = [TRIALS_FILE, SEARCH_FILE, *([BEST_CONFIG, REPORT_FILE] if best else [])]
    names += [f"figures/{name}" for name in pictures]
    files = {name: search.folder / name for name in names}
    scores = {f"best_{k}": v for k, v in scores_of(best).items()}
    scores |= numbers([result]) if result else {}  # Those on test rows.
    said = f"best is trial {best.number}: {dict(best.settings)}" if best else ""
    tags = {"method": search.config.method, "seed": str(search.config.seed)}
    records = [scores, *(base_numbers([result]) if result else [])]
    mirror.finish(files, records, tags=tags, note=said, error="" if best else why_none(found))
