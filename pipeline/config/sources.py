"""From the config's `tasks` to `Task`s, through the JSON that a prepare stage depends on."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from agcl.errors import InputError
from agcl.scoring.scorers import TEACHER_FORCED
from agcl.tasks import VALIDATION, Task
from agcl.tasks.selection import select

from pipeline.config.config import Config
from pipeline.config.task_section import Source
from pipeline.config.tasks import OPEN, FactsTasks
from pipeline.config.training import Evaluation

BASE_TASK = "base"
"""Name of the built-in model's generic facts, which are scored in addition to the tasks."""


def sources(config: Config) -> list[Source]:
    """The tasks of the sequence. Raises `InputError` for a missing file or folder."""
    return [
        replace(source, settings={"format": config.tasks.format, **source.settings})
        for source in config.tasks.sources(config)
    ]


def check_places(config: Config) -> None:
    """Raise `InputError` for a missing file or folder. Imports neither torch nor transformers."""
    for each in filter(None, (config, base_rows(config))):
        for source in sources(each):
            for role, path in source.files.items():
                if not path.exists():
                    raise InputError(f"task {source.name}: no {role} file {path}")
    if config.base.protect == "text" and config.base.text and not config.base.text.exists():
        raise InputError(f"base.text: no file or folder {config.base.text}")
    for file in config.evaluation.probes:
        if not file.is_file():
            raise InputError(f"evaluation.probes: no file {file}")
    model = config.model
    if not model.is_builtin and not model.on_hub and not model.folder.is_dir():
        raise InputError(f"model.path: no folder {model.folder}")


def held_out_sources(config: Config) -> list[Source]:
    """What the built-in base model knows and no task trains: its generic facts."""
    if not config.model.is_builtin:
        return []
    seed = config.tasks.seed if isinstance(config.tasks, FactsTasks) else 0
    entities = config.model.pretraining.entities
    return [Source(BASE_TASK, {"format": "facts-base", "entities": entities, "seed": seed})]


def base_rows(config: Config) -> Config | None:
    """The config whose tasks are the rows that protect the base model, if there are any."""
    rows = config.base.rows
    if config.base.protect != "rows" or rows is None:
        return None
    return config.model_copy(update={"tasks": rows, "evaluation": Evaluation()})


def text_files(path: Path) -> list[Path]:
    """A text file itself, or the files in a folder and its folders, sorted, without hidden ones.

    Raises `InputError` if there is none, or only empty ones.
    """
    inside = sorted(path.rglob("*")) if path.is_dir() else [path]
    shown = (f for f in inside if not any(p.startswith(".") for p in f.relative_to(path).parts))
    files = [file for file in shown if file.is_file() and file.stat().st_size]
    if not files:
        raise InputError(f"no text in {path}")
    return files


def selection(config: Config, source: Source) -> dict[str, Any]:
    """Which rows of a task are used for what: keywords of `agcl.tasks.selection.select`."""
    tasks = config.tasks
    # If a task is scored on its training rows, evaluate chooses the validation rows among them.
    task = open_task(source.settings, source.files)
    from_scored = task.memorized and VALIDATION not in task.splits
    return {
        "train_rows": tasks.train_rows,
        "test_rows": tasks.test_rows,
        "validation": 0.0 if from_scored else config.evaluation.validation,
        "seed": tasks.seed,
    }


def open_task(
    settings: Mapping[str, Any],
    files: Mapping[str, Path],
    selection: Mapping[str, Any] | None = None,
) -> Task:
    """The task of a source's settings and files, with the rows that `selection` keeps."""
    rest = {key: value for key, value in settings.items() if key != "format"}
    task = OPEN[settings["format"]](rest, files)
    return select(task, **selection) if selection else task


def decodes(config: Config) -> bool:
    """Whether a scorer needs answers that are decoded token by token."""
    of_tasks = {open_task(source.settings, source.files).scorer for source in sources(config)}
    return not {*config.evaluation.scorers, *of_tasks} <= {TEACHER_FORCED}
