"""A run's own folder: its config, its results, links to its artifacts, and logs of failures."""

import json
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from agcl.errors import InputError

from pipeline.config import loading
from pipeline.config.config import Config
from pipeline.errors import StageFailed
from pipeline.plan.plan import Run
from pipeline.results.results import RunResult, StageRecord
from pipeline.stages.files import CHECKS, IMPORTANCE_SUMMARY, METRICS, SUMMARY
from pipeline.storage import artifact
from pipeline.storage.artifact import folder_name

CONFIG_FILE = "config.yaml"
_FREE = {"run": {"resources", "tracking", "search"}, "search": {"resources", "tracking"}}
"""Sections that a rerun into the same folder may change: they do not change results."""
_MOST_NAMED = 3


def check_folder(config: Config, file: Path, kind: str = "run") -> None:
    """Refuse the folder of `file`, a stored config, if it is of another run or search.

    The results there would be lost, or not be comparable with new ones. A run that has no results
    yet is taken over. Raises `InputError`, which names the keys and both values.
    """
    results = file.parent / METRICS
    config.storage.refresh(file)
    config.storage.refresh(results)
    if not file.is_file() or (kind == "run" and not results.is_file()):
        return
    try:
        stored = loading.load(file)  # Keys that came with a later version have their defaults.
    except InputError as error:
        raise InputError(f"{file}: {error}; delete it to write it again") from None
    before, now = (dict(loading.leaves(each, exclude=_FREE[kind])) for each in (stored, config))
    differing = [key for key in before | now if before.get(key) != now.get(key)]
    if differing:
        said = [f"{k}={before.get(k)}, not {now.get(k)}" for k in differing[:_MOST_NAMED]]
        more = len(differing) - _MOST_NAMED
        said += [f"and {more} more"] * (more > 0)
        raise InputError(
            f"name: {config.storage.place(file.parent)} holds a {kind} with {'; '.join(said)}; "
            f"choose another name (name={config.name}-2) or delete that folder. Finished stages "
            "are shared."
        )


def open_folder(run: Run) -> None:
    """Make the run's folder, with its config in it."""
    run.folder.mkdir(parents=True, exist_ok=True)
    artifact.write_text(run.folder / CONFIG_FILE, loading.dump(run.config))


def write_results(run: Run, command: str, done_before: set[Path]) -> RunResult:
    """Write the run's own files from its artifacts."""
    names = {folder_name(name) for name in run.resolved}
    for file in run.folder.iterdir():
        if file.is_symlink() and file.name not in names:
            file.unlink()  # Of a run that had no results, and whose folder this one took over.
    for name, stage in run.resolved.items():
        if stage.folder.exists():  # Of a bucket, only what was needed is on this machine.
            _link(run.folder / folder_name(name), stage.folder)
        artifact.remove_leftovers(stage.folder)
    report = run.resolved["report"]
    prepared = summaries(run)
    metrics = {
        "name": run.config.name,
        **(_json(report.read(METRICS)) or {}),
        "scorers": {task: summary["scorer"] for task, summary in prepared.items()},
    }
    artifact.write_json(run.folder / METRICS, metrics)
    manifests = {name: stage.manifest() or {} for name, stage in run.resolved.items()}
    provenance = artifact.provenance()
    return RunResult(
        metrics=metrics,
        config_yaml=(run.folder / CONFIG_FILE).read_text(encoding="utf-8"),
        stages=[
            StageRecord(
                name=name,
                fingerprint=stage.fingerprint,
                seconds=float(manifests[name].get("seconds", 0)),
                reused=stage.folder in done_before,
            )
            for name, stage in run.resolved.items()
        ],
        importance=_json(report.read(IMPORTANCE_SUMMARY)),
        checks=_json(report.read(CHECKS)),
        rows={task: summary["splits"] for task, summary in prepared.items()},
        provenance={
            "command": command,
            "git": provenance["git"],
            **provenance["versions"],
            "seed": str(run.config.seed),
        },
    )


def summaries(run: Run) -> dict[str, dict[str, Any]]:
    """What is known of the run's prepared tasks: counts by split, evaluation sets, scorer."""
    return {
        task: _json(run.resolved[f"prepare/{task}"].read(SUMMARY)) or {} for task in run.plan.tasks
    }


def write_log(folder: Path, failure: StageFailed) -> None:
    """Write why a stage failed, and name the file in the failure."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    file = folder / "logs" / f"{folder_name(failure.stage)}-{stamp}.log"
    with suppress(OSError):  # The disk may be full, and why the stage failed says more.
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(failure.traceback, encoding="utf-8")
        failure.log = file


def _link(link: Path, target: Path) -> None:
    """Point a symbolic link at an artifact, by a relative path, replacing an older one."""
    aside = link.with_name(link.name + ".part")
    with suppress(FileNotFoundError):
        aside.unlink()
    aside.symlink_to(os.path.relpath(target, link.parent), target_is_directory=True)
    if link.is_dir() and not link.is_symlink():
        shutil.rmtree(link)
    aside.replace(link)


def _json(content: bytes | None) -> dict[str, Any] | None:
    return None if content is None else json.loads(content)
