"""From the config's `tasks` to `Task`s, by way of the JSON that a prepare stage depends on."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agcl.errors import InputError
from agcl.model import models
from agcl.tasks import Task, choice, cl_benchmark, concept1k, facts, files, huggingface, trace

from pipeline.config.config import Config
from pipeline.config.tasks import (
    ClBenchmarkTasks,
    Concept1KTasks,
    FactsTasks,
    FileTask,
    FileTasks,
    HuggingFaceTasks,
    TraceTasks,
)

BASE_TASK = "base"
"""Name of the built-in model's generic facts, scored beside the tasks."""


@dataclass(frozen=True)
class Source:
    """What a task is made from: settings, and files of which the contents count, not the paths."""

    name: str
    settings: Mapping[str, Any]
    """JSON; `format` says which other keys there are."""
    files: Mapping[str, Path] = field(default_factory=dict)


def sources(config: Config) -> list[Source]:
    """Where every task of the sequence comes from. Raises `InputError` for a missing folder."""
    match config.tasks:
        case FactsTasks() as tasks:
            found = [_facts(config, tasks, index) for index in range(tasks.count)]
        case Concept1KTasks() as tasks:
            file = _absolute(tasks.path) / "dataset.txt"
            found = [
                Source(
                    f"concepts-{index}",
                    {
                        "format": "concept1k",
                        "index": index,
                        "concepts_per_task": tasks.concepts_per_task,
                    },
                    {"file": file},
                )
                for index in range(tasks.count)
            ]
        case TraceTasks() as tasks:
            found = [_trace(_absolute(tasks.path) / name) for name in tasks.names]
        case ClBenchmarkTasks() as tasks:
            found = _cl_benchmark(tasks)
        case FileTasks() as tasks:
            found = [_files(tasks, task) for task in tasks.sequence]
        case HuggingFaceTasks() as tasks:
            found = _huggingface(tasks)
    return found


def held_out_sources(config: Config) -> list[Source]:
    """Skills of the base model that are scored beside the tasks: the built-in generic facts."""
    if config.model.path != models.BUILTIN:
        return []
    seed = config.tasks.seed if isinstance(config.tasks, FactsTasks) else 0
    entities = config.model.pretraining.entities
    return [Source(BASE_TASK, {"format": "facts-base", "entities": entities, "seed": seed})]


def open_task(
    settings: Mapping[str, Any],
    of_files: Mapping[str, Path],
    selection: Mapping[str, Any] | None = None,
) -> Task:
    """The task of a source's settings and files, with the rows that `selection` keeps."""
    task = _task({**settings}, of_files)
    return choice.select(task, **selection) if selection else task


def selection(config: Config, source: Source) -> dict[str, Any]:
    """Which rows of a task are used for what: keywords of `choice.select`."""
    tasks = config.tasks
    # What is set apart from the scored rows is chosen when they are scored, not here.
    memorized = open_task(source.settings, source.files).memorized
    return {
        "train_rows": tasks.train_rows,
        "test_rows": tasks.test_rows,
        "validation": 0.0 if memorized else config.evaluation.validation,
        "seed": tasks.seed,
    }


def _task(settings: dict[str, Any], of_files: Mapping[str, Path]) -> Task:
    match settings.pop("format"):
        case "facts":
            return facts.task(**settings)
        case "facts-base":
            return facts.base(**settings)
        case "concept1k":
            return concept1k.task(file=of_files["file"], **settings)
        case "trace":
            return trace.task(files=of_files, **settings)
        case "cl_benchmark":
            return cl_benchmark.task(files=of_files, **settings)
        case "huggingface":
            folder = of_files.get("folder")
            return huggingface.task(**settings | ({"path": str(folder)} if folder else {}))
        case ("jsonl" | "parquet") as format:
            return files.task(files=of_files, format=format, **settings)
        case other:
            raise ValueError(f"no task format {other!r}")


def _absolute(path: Path) -> Path:
    return path.expanduser().absolute()


def _facts(config: Config, tasks: FactsTasks, index: int) -> Source:
    settings = {
        "format": "facts",
        "index": index,
        "entities": tasks.entities,
        "base_entities": config.model.pretraining.entities,
        "seed": tasks.seed,
    }
    return Source(_task(dict(settings), {}).name, settings)


def _trace(folder: Path) -> Source:
    of_files = {split: folder / name for split, name in trace.FILES.items()}
    for split, file in list(of_files.items()):
        if not file.is_file():
            if split != "validation":
                raise InputError(f"tasks.path: no file {file}")
            del of_files[split]
    return Source(folder.name, {"format": "trace", "name": folder.name}, of_files)


def _cl_benchmark(tasks: ClBenchmarkTasks) -> list[Source]:
    root = _absolute(tasks.path)
    folders = cl_benchmark.folders(root)
    found = []
    for name in tasks.sequence:
        if name not in folders:
            raise InputError(f"tasks.sequence: no set {name!r} (there are {', '.join(folders)})")
        of_files = {part: folders[name] / f"{part}.json" for part in ("train", "test", "labels")}
        of_files["instructions"] = root / cl_benchmark.INSTRUCTIONS
        for file in of_files.values():
            if not file.is_file():
                raise InputError(f"tasks.path: no file {file}")
        kind = folders[name].parent.name
        settings = {"format": "cl_benchmark", "name": name, "type": kind}
        found.append(Source(name, settings, of_files))
    return found


def _rendering(tasks: FileTasks | HuggingFaceTasks, task: Any) -> dict[str, str]:
    keys = ("prompt", "answer", "scorer")
    return {key: getattr(task, key) or getattr(tasks, key) for key in keys}


def _files(tasks: FileTasks, task: FileTask) -> Source:
    if task.path is not None:
        folder = _absolute(task.path)
        if not folder.is_dir():
            raise InputError(f"tasks.sequence: no folder {folder}")
        at = {split: folder / f"{split}.{tasks.format}" for split in files.SPLITS}
        at = {split: file for split, file in at.items() if file.exists() or split == "train"}
        name = task.name or folder.name
    else:
        given = {split: getattr(task, split) for split in files.SPLITS}
        at = {split: _absolute(path) for split, path in given.items() if path is not None}
        name = task.name or ""
    return Source(name, {"format": tasks.format, "name": name, **_rendering(tasks, task)}, at)


def _huggingface(tasks: HuggingFaceTasks) -> list[Source]:
    found = []
    for task in tasks.sequence:
        folder = _absolute(Path(task.path))
        name = task.name or Path(task.path).name
        splits = {split: getattr(task, split) for split in files.SPLITS}
        settings = {
            "format": "huggingface",
            "name": name,
            "path": "" if folder.is_dir() else task.path,
            "subset": task.subset,
            "revision": task.revision,
            "splits": {ours: theirs for ours, theirs in splits.items() if theirs},
            **_rendering(tasks, task),
        }
        found.append(Source(name, settings, {"folder": folder} if folder.is_dir() else {}))
    return found
