"""The config's `tasks`: one section per format, which says what each task is made from.

A new format is a module in `agcl/tasks/`, and here a section, added to `TaskFormat` and to `OPEN`.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Literal

from agcl.errors import InputError
from agcl.tasks import (
    Task,
    cl_benchmark,
    concept1k,
    facts,
    files,
    huggingface,
    records,
    super_ni,
    trace,
)
from agcl.tasks.layouts import LAYOUTS
from pydantic import Field

from pipeline.config.own_tasks import FileTasks, HuggingFaceTasks, file_format
from pipeline.config.section import Place, Positive
from pipeline.config.task_section import Paths, Settings, Source, TaskSection

if TYPE_CHECKING:
    from pipeline.config.config import Config


class FactsTasks(TaskSection):
    """Built-in synthetic tasks about invented people."""

    format: Literal["facts"] = "facts"
    count: int = Field(4, ge=1, le=100)
    """Number of tasks."""
    entities: int = Field(12, ge=1, le=1000)
    """New people per task, four facts each."""

    def sources(self, config: "Config") -> Iterator[Source]:
        """Their people differ from each other and from those of the base model's facts."""
        for index in range(self.count):
            settings = {
                "index": index,
                "entities": self.entities,
                "base_entities": config.model.pretraining.entities,
                "seed": self.seed,
            }
            yield Source(facts.task(**settings).name, settings)


class Concept1KTasks(TaskSection):
    """The Concept-1K benchmark: ten tasks of about 1,670 facts."""

    format: Literal["concept1k"]
    path: Place
    """Folder with `dataset.txt`."""
    count: int = Field(10, ge=1, le=10)
    """Number of tasks, from the first."""
    concepts_per_task: Positive | None = None
    """Use only the first concepts of each task, about 16 facts per concept; null uses all."""

    def sources(self, config: "Config") -> Iterator[Source]:
        """All tasks are in one file."""
        paths = _existing({"file": self.path / "dataset.txt"})
        for index in range(self.count):
            settings = {"index": index, "concepts_per_task": self.concepts_per_task}
            yield Source(f"concepts-{index}", settings, paths)


class TraceTasks(TaskSection):
    """The TRACE benchmark: eight tasks, each with its own scorer."""

    format: Literal["trace"]
    path: Place
    """Folder with `<task>/{train,test}.json`, and `eval.json` for validation rows."""
    order: Literal[1, 2] = 1
    """One of the paper's two orders."""
    sequence: tuple[Literal[tuple(trace.SCORERS)], ...] | None = None  # type: ignore[valid-type]
    """Task names in training order, instead of `order`."""

    def sources(self, config: "Config") -> Iterator[Source]:
        """Each task has a folder."""
        for name in self.sequence or trace.ORDERS[self.order]:
            paths = {split: self.path / name / f for split, f in trace.FILES.items()}
            if not paths["validation"].is_file():
                del paths["validation"]
            yield Source(name, {"name": name}, _existing(paths))


class ClBenchmarkTasks(TaskSection):
    """Classification datasets of the O-LoRA benchmark."""

    format: Literal["cl_benchmark"]
    path: Place
    """Folder with `instruction_config.json` and `<type>/<set>/{train,test,labels}.json`."""
    sequence: tuple[str, ...] = Field(min_length=1)
    """Datasets in training order, such as `[agnews, MNLI]`."""

    def sources(self, config: "Config") -> Iterator[Source]:
        """Each dataset has a folder, in the folder of its type."""
        folders = cl_benchmark.folders(self.path)
        for name in self.sequence:
            if name not in folders:
                there = ", ".join(folders)
                raise InputError(f"tasks.sequence: no set {name!r} (there are {there})")
            paths = {part: folders[name] / f"{part}.json" for part in ("train", "test", "labels")}
            paths["instructions"] = self.path / cl_benchmark.INSTRUCTIONS
            settings = {"name": name, "type": folders[name].parent.name}
            yield Source(name, settings, _existing(paths))


class SuperNiTasks(TaskSection):
    """Super-NaturalInstructions: 15 tasks with an instruction each, scored by ROUGE-L."""

    format: Literal["super_ni"]
    path: Place
    """Folder with `task<number>_<what>/{train,test}.json`."""
    order: Literal[1, 2] = 1
    """One of the literature's two orders."""
    sequence: tuple[str, ...] | None = Field(None, min_length=1)
    """Folder names in training order, instead of `order`."""
    count: Positive | None = None
    """Number of tasks, from the first; null takes all."""
    truncate: Literal["drop", "left"] = "left"
    """Cuts the beginning of long inputs and keeps the instruction; or drops long rows."""

    def sources(self, config: "Config") -> Iterator[Source]:
        """Each task has a folder."""
        folders = super_ni.folders(self.path)
        for name in (self.sequence or super_ni.in_order(folders, self.order))[: self.count]:
            if name not in folders:
                there = ", ".join(folders)
                raise InputError(f"tasks.sequence: no task {name!r} (there are {there})")
            paths = {split: folders[name] / file for split, file in super_ni.FILES.items()}
            yield Source(name, {"name": name}, _existing(paths))


TaskFormat = (
    FactsTasks
    | Concept1KTasks
    | TraceTasks
    | ClBenchmarkTasks
    | SuperNiTasks
    | FileTasks
    | HuggingFaceTasks
)


def _in_files(format: str, settings: Settings, paths: Paths) -> Task:
    return files.task(files=paths, format=file_format(format), **settings)


OPEN: dict[str, Callable[[Settings, Paths], Task]] = {
    "facts": lambda settings, paths: facts.task(**settings),
    "facts-base": lambda settings, paths: facts.base(**settings),
    "concept1k": lambda settings, paths: concept1k.task(file=paths["file"], **settings),
    "trace": lambda settings, paths: trace.task(files=paths, **settings),
    "cl_benchmark": lambda settings, paths: cl_benchmark.task(files=paths, **settings),
    "super_ni": lambda settings, paths: super_ni.task(files=paths, **settings),
    **{format: partial(_in_files, format) for format in (*records.FORMATS, *LAYOUTS)},
    "huggingface": lambda settings, paths: huggingface.task(
        **{**settings, "path": str(paths.get("folder", settings["path"]))}
    ),
}
"""By format: from the settings and files of a source to its task."""


def _existing(paths: Paths) -> Paths:
    for file in paths.values():
        if not file.is_file():
            raise InputError(f"tasks.path: no file {file}")
    return paths
