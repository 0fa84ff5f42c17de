"""From the config's `tasks` to `Task`s, through the JSON that a prepare stage depends on."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

from agcl.model import models
from agcl.tasks import Task, choice, facts

from pipeline.config.config import Config
from pipeline.config.tasks import FactsTasks, Source, TaskFormat

BASE_TASK = "base"
"""Name of the built-in model's generic facts, which are scored beside the tasks."""


def sources(config: Config) -> list[Source]:
    """The tasks of the sequence. Raises `InputError` for a missing file or folder."""
    return config.tasks.sources(config)


def held_out_sources(config: Config) -> list[Source]:
    """What the base model knows and no task trains: the built-in model's generic facts."""
    if config.model.path != models.BUILTIN:
        return []
    seed = config.tasks.seed if isinstance(config.tasks, FactsTasks) else 0
    entities = config.model.pretraining.entities
    return [Source(BASE_TASK, {"format": "facts-base", "entities": entities, "seed": seed})]


def selection(config: Config, source: Source) -> dict[str, Any]:
    """Keywords of `choice.select`: which rows of a task are used for what."""
    tasks = config.tasks
    # A task that is scored on its training rows gets its validation rows when it is scored.
    memorized = open_task(source.settings, source.files).memorized
    return {
        "train_rows": tasks.train_rows,
        "test_rows": tasks.test_rows,
        "validation": 0.0 if memorized else config.evaluation.validation,
        "seed": tasks.seed,
    }


def open_task(
    settings: Mapping[str, Any],
    files: Mapping[str, Path],
    selection: Mapping[str, Any] | None = None,
) -> Task:
    """The task of a source's settings and files, with the rows that `selection` keeps."""
    rest = {key: value for key, value in settings.items() if key != "format"}
    task = _OPEN[settings["format"]](settings["format"], rest, files)
    return choice.select(task, **selection) if selection else task


_OPEN: dict[str, Callable[[str, Mapping[str, Any], Mapping[str, Path]], Task]] = {
    "facts-base": lambda format, settings, paths: facts.base(**settings),
    **{
        format: section.open
        for section in get_args(TaskFormat)
        for format in get_args(section.model_fields["format"].annotation)
    },
}
