"""A run's own folder: its config, its results, links to its artifacts, and logs of failures."""

import json
import math
import os
import shutil
import time
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from agcl.errors import InputError, one_line
from rich.console import Console

from pipeline.config import loading
from pipeline.config.config import Config
from pipeline.config.naming import method_description
from pipeline.errors import StageFailed
from pipeline.plan.plan import Run
from pipeline.results.examples import examples, losses
from pipeline.results.files import CONFIG_FILE, RESULT_FILE, TRIALS_FILE
from pipeline.results.results import RunResult, StageRecord
from pipeline.stages.files import CHECKS, IMPORTANCE_SUMMARY, METRICS, SUMMARY
from pipeline.storage import artifact
from pipeline.storage.artifact import folder_name

FREE = {"run": {"resources", "tracking", "search"}, "search": {"resources", "tracking"}}
"""Sections that a rerun into the same folder may change: they do not change results."""
_MOST_NAMED = 3


def check_folder(
    config: Config, file: Path, kind: str = "run", *, tuned: Collection[str] = ()
) -> None:
    """Refuse the folder of `file`, a stored config, if it belongs to another run or search.

    Its results would be lost, or not be comparable with new ones. The folder of a run without
    results is taken over. Settings in `tuned`, keys or whole sections, may differ: trials choose
    their values. Raises `InputError`, which names the keys and both values.
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
    before, now = (dict(loading.leaves(each, exclude=FREE[kind])) for each in (stored, config))
    keys = [key for key in before | now if not {key, key.partition(".")[0]} & {*tuned}]
    differing = [key for key in keys if before.get(key) != now.get(key)]
    if differing:
        values = ["null" if of.get(k) is None else of[k] for k in differing for of in (before, now)]
        pairs = zip(differing, values[::2], values[1::2], strict=True)
        said = [f"{key}={old}, not {new}" for key, old, new in pairs][:_MOST_NAMED]
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
        if not stage.storage.shared and name.startswith("train/"):  # Killed after its upload.
            stage.storage.checkpoint(stage.folder, stage.fingerprint, 1).remove()
    report = run.resolved["report"]
    prepared = summaries(run)
    metrics = {
        "name": run.config.name,
        "description": method_description(run.config),
        **(_json(report.read(METRICS)) or {}),
        "scorers": dict(run.plan.scorers),
    }
    artifact.write_json(run.folder / METRICS, metrics)
    manifests = {name: stage.manifest() or {} for name, stage in run.resolved.items()}
    provenance = artifact.provenance()
    content = {
        "stages": [
            {
                "name": name,
                "fingerprint": stage.fingerprint,
                "seconds": float(manifests[name].get("seconds", 0)),
                "reused": stage.folder in done_before,
            }
            for name, stage in run.resolved.items()
        ],
        "importance": _json(report.read(IMPORTANCE_SUMMARY)),
        "checks": _json(report.read(CHECKS)),
        "rows": {task: summary["splits"] for task, summary in prepared.items()},
        "weights": _weights(run),
        "finished": max(m.get("started", 0) + m.get("seconds", 0) for m in manifests.values()),
        "examples": examples(run, metrics["evaluation_set"]),
        "losses": losses(run),
        "provenance": {
            "command": command,
            "git": provenance["git"],
            **provenance["versions"],
            "seed": str(run.config.seed),
        },
    }
    artifact.write_json(run.folder / RESULT_FILE, content)
    return read_result(run.folder)


def read_result(folder: Path) -> RunResult:
    """The result of a finished run, from its folder alone. Raises `InputError` if there is none."""
    if not (folder / METRICS).is_file():
        raise InputError(f"{folder}: no finished run (no {METRICS}) in this folder")
    if not (folder / RESULT_FILE).is_file():
        raise InputError(
            f"{folder}: written by an earlier version of agcl (no {RESULT_FILE}); "
            f"run it again with `agcl run {folder / CONFIG_FILE}`"
        )
    metrics, content = (
        json.loads((folder / name).read_text(encoding="utf-8")) for name in (METRICS, RESULT_FILE)
    )
    stages = [StageRecord(**stage) for stage in content.pop("stages")]
    config_yaml = (folder / CONFIG_FILE).read_text(encoding="utf-8")
    return RunResult(metrics=metrics, config_yaml=config_yaml, stages=stages, **content)


def write_runs(folder: Path, runs: Sequence[Path]) -> None:
    """Record which runs below a folder were compared there last, in their order."""
    names = [os.path.relpath(run, folder) for run in runs]
    artifact.write_json(folder / RESULT_FILE, {"runs": names})


def runs_in(folder: Path) -> list[Path]:
    """The folders of the runs that a report on a folder shows: itself, or those below it.

    Raises `InputError` if there is no finished run.
    """
    if (folder / METRICS).is_file():
        return [folder]
    with suppress(FileNotFoundError, ValueError, KeyError, TypeError):  # Or a run without metrics.
        names = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))["runs"]
        return [folder / name for name in names]
    found = [f.parent for f in sorted(folder.glob(f"*/{METRICS}")) if not f.parent.is_symlink()]
    if not found:
        trials = f"; its trials are in {TRIALS_FILE}" * (folder / TRIALS_FILE).is_file()
        raise InputError(f"{folder}: no finished run (no {METRICS}) in this folder{trials}")
    return found


def read_trials(folder: Path) -> list[dict[str, Any]]:
    """The trials of a search by column, empty for other folders. Raises `InputError` for damage."""
    file = folder / TRIALS_FILE
    try:
        return pq.read_table(file).to_pylist() if file.is_file() else []
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{file}: damaged ({one_line(error)}); run the same command again to write it"
        ) from None


def write_trials(folder: Path, trials: pa.Table) -> None:
    """Write the trials of a search, one per row, atomically."""
    file = folder / TRIALS_FILE
    aside = file.with_name(file.name + ".part")
    pq.write_table(trials, aside)
    aside.replace(file)


def _weights(run: Run) -> int | None:
    """Number of weights in the base model's files: safetensors start with a header of shapes."""
    model = run.config.model
    folder = run.resolved["pretrain"].folder if model.is_builtin else model.folder
    total = 0
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        header.pop("__metadata__", None)
        total += sum(math.prod(tensor["shape"]) for tensor in header.values())
    return total or None


def summaries(run: Run) -> dict[str, dict[str, Any]]:
    """What is known of the run's prepared tasks: counts by split, evaluation sets."""
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


def locked(folder: Path, console: Console) -> AbstractContextManager[None]:
    """Lock a folder against other commands. Waits, and says so, while one of them holds it."""
    waiting = f"  waiting for another command that works on {folder}"
    on_wait = partial(console.print, waiting, highlight=False, soft_wrap=True, markup=False)
    return artifact.claimed(folder, on_wait)
