"""The config's `tasks`: one section per format. A section says what each task is made from, and
opens it.

A new format is a module in `agcl/tasks/` and a section here, added to `TaskFormat`.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from agcl.errors import InputError
from agcl.tasks import Task, cl_benchmark, concept1k, facts, files, huggingface, trace
from agcl.tasks.template import columns
from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from pipeline.config.section import Place, Positive, Section, Seed, usable_path

if TYPE_CHECKING:
    from pipeline.config.config import Config

Settings = Mapping[str, Any]
Paths = Mapping[str, Path]


@dataclass(frozen=True)
class Source:
    """What a task is made from. It determines the task: the fingerprint of its rows covers it."""

    name: str
    settings: Settings
    """JSON; `format` is always there, the other keys depend on it."""
    files: Paths = field(default_factory=dict)
    """By role. Their contents count, not their paths."""


def _readable(template: str) -> str:
    try:
        columns(template)
    except InputError as error:
        raise PydanticCustomError("template", "{reason}", {"reason": str(error)}) from None
    return template


Template = Annotated[str, Field(min_length=1), AfterValidator(_readable)]


class TaskSection(Section):
    """Settings of all task formats."""

    max_length: Positive = 512
    """Maximum tokens per row, prompt and answer together; longer rows are dropped and counted."""
    train_rows: Positive | None = None
    """Maximum training rows per task, sampled by `seed`; null takes all."""
    test_rows: Positive | None = None
    """Maximum test rows per task, and maximum validation rows where a task has them."""
    seed: Seed = 0
    """Seed for sampling rows and for the built-in facts. Independent of the run's `seed`."""
    chat_template: bool = False
    """Render each prompt as a user message with the tokenizer's chat template."""

    @abstractmethod
    def sources(self, config: "Config") -> list[Source]:
        """The tasks in training order. Raises `InputError` for a missing file or folder."""

    @staticmethod
    @abstractmethod
    def open(format: str, settings: Settings, paths: Paths) -> Task:
        """The task of a source, from its settings without `format`."""


class FactsTasks(TaskSection):
    """Built-in synthetic tasks about invented people."""

    format: Literal["facts"] = "facts"
    count: int = Field(4, ge=1, le=100)
    """Number of tasks."""
    entities: int = Field(12, ge=1, le=1000)
    """New people per task, four facts each."""

    def sources(self, config: "Config") -> list[Source]:
        """Tasks that differ in their people and relations."""
        found = []
        for index in range(self.count):
            settings = {
                "index": index,
                "entities": self.entities,
                "base_entities": config.model.pretraining.entities,
                "seed": self.seed,
            }
            found.append(Source(facts.task(**settings).name, {"format": "facts", **settings}))
        return found

    @staticmethod
    def open(format: str, settings: Settings, paths: Paths) -> Task:
        """See `agcl.tasks.facts`."""
        return facts.task(**settings)


class Concept1KTasks(TaskSection):
    """The Concept-1K benchmark: ten tasks of about 1,670 facts."""

    format: Literal["concept1k"]
    path: Place
    """Folder with `dataset.txt`."""
    count: int = Field(10, ge=1, le=10)
    """Number of tasks, from the first."""
    concepts_per_task: Positive | None = None
    """Use only the first concepts of each task, about 16 facts per concept; null uses all."""

    def sources(self, config: "Config") -> list[Source]:
        """All tasks read one file."""
        settings = {"format": "concept1k", "concepts_per_task": self.concepts_per_task}
        at = {"file": _absolute(self.path) / "dataset.txt"}
        return [
            Source(f"concepts-{index}", {**settings, "index": index}, at)
            for index in range(self.count)
        ]

    @staticmethod
    def open(format: str, settings: Settings, paths: Paths) -> Task:
        """See `agcl.tasks.concept1k`."""
        return concept1k.task(file=paths["file"], **settings)


class TraceTasks(TaskSection):
    """The TRACE benchmark: eight tasks, each with its own scorer."""

    format: Literal["trace"]
    path: Place
    """Folder with `<task>/{train,test}.json`, and `eval.json` for validation rows."""
    order: Literal[1, 2] = 1
    """One of the paper's two orders."""
    sequence: tuple[Literal[tuple(trace.SCORERS)], ...] | None = None  # type: ignore[valid-type]
    """Task names in training order, instead of `order`."""

    def sources(self, config: "Config") -> list[Source]:
        """One folder per task."""
        return [self._source(name) for name in self.sequence or trace.ORDERS[self.order]]

    def _source(self, name: str) -> Source:
        at = {split: _absolute(self.path) / name / file for split, file in trace.FILES.items()}
        if not at["validation"].is_file():
            del at["validation"]
        return Source(name, {"format": "trace", "name": name}, _existing(at))

    @staticmethod
    def open(format: str, settings: Settings, paths: Paths) -> Task:
        """See `agcl.tasks.trace`."""
        return trace.task(files=paths, **settings)


class ClBenchmarkTasks(TaskSection):
    """Classification datasets of the O-LoRA benchmark."""

    format: Literal["cl_benchmark"]
    path: Place
    """Folder with `instruction_config.json` and `<type>/<set>/{train,test,labels}.json`."""
    sequence: tuple[str, ...] = Field(min_length=1)
    """Datasets in training order, such as `[agnews, MNLI]`."""

    def sources(self, config: "Config") -> list[Source]:
        """One folder per dataset."""
        root = _absolute(self.path)
        folders = cl_benchmark.folders(root)
        found = []
        for name in self.sequence:
            if name not in folders:
                there = ", ".join(folders)
                raise InputError(f"tasks.sequence: no set {name!r} (there are {there})")
            at = {part: folders[name] / f"{part}.json" for part in ("train", "test", "labels")}
            at["instructions"] = root / cl_benchmark.INSTRUCTIONS
            settings = {"format": "cl_benchmark", "name": name, "type": folders[name].parent.name}
            found.append(Source(name, settings, _existing(at)))
        return found

    @staticmethod
    def open(format: str, settings: Settings, paths: Paths) -> Task:
        """See `agcl.tasks.cl_benchmark`."""
        return cl_benchmark.task(files=paths, **settings)


class Rendering(Section):
    """How a record becomes a prompt and an answer: text with column names in braces."""

    prompt: Template = "{prompt}"
    """Such as `"{question}\\nAnswer:"`."""
    answer: Template = "{answer}"
    """Such as `" {label}"`; start it with the space that separates it from the prompt."""
    scorer: str = "exact_match"
    """How predictions are scored: a name in `agcl/scoring/scorers.py`, or
    `package.module:function`."""

    def rendering_of(self, task: "OwnTask") -> dict[str, str]:
        """The settings of one task: its own, or else those of the section."""
        keys = ("prompt", "answer", "scorer")
        return {key: getattr(task, key) or getattr(self, key) for key in keys}


class OwnTask(Section):
    """One task. Its prompt, answer and scorer default to those of the section."""

    prompt: Template | None = None
    answer: Template | None = None
    scorer: str | None = None


class FileTask(OwnTask):
    """One task from files: `path`, or a file or folder of files per split."""

    name: str | None = None
    """Null takes the folder's name."""
    path: Place | None = None
    """Folder with `train.<format>`, and optionally `test.<format>` and `validation.<format>`."""
    train: Place | None = None
    test: Place | None = None
    """Rows to score; without it the training rows are scored."""
    validation: Place | None = None
    """Rows for `evaluation.validation`; without it a share of the training rows is held out."""

    @model_validator(mode="after")
    def _one_place(self) -> "FileTask":
        if (self.path is None) == (self.train is None):
            raise ValueError("train: give either path or train")
        if self.path is not None and (self.test or self.validation):
            raise ValueError("path: cannot be combined with test or validation")
        if self.path is None and self.name is None:
            raise ValueError("name: missing")
        return self


class FileTasks(TaskSection, Rendering):
    """Your own tasks: JSON lines (one object per line) or Parquet."""

    format: Literal["jsonl", "parquet"]
    sequence: tuple[FileTask, ...] = Field(min_length=1)
    """Tasks in training order."""

    def sources(self, config: "Config") -> list[Source]:
        """One folder, or a file per split, for each task."""
        return [self._source(task) for task in self.sequence]

    def _source(self, task: FileTask) -> Source:
        if task.path is None:
            given = {split: getattr(task, split) for split in files.SPLITS}
            at = {split: _absolute(path) for split, path in given.items() if path is not None}
            name = task.name or ""
        else:
            folder = _absolute(task.path)
            if not folder.is_dir():
                raise InputError(f"tasks.sequence: no folder {folder}")
            at = {split: folder / f"{split}.{self.format}" for split in files.SPLITS}
            at = {split: file for split, file in at.items() if file.exists() or split == "train"}
            name = task.name or folder.name
        return Source(name, {"format": self.format, "name": name, **self.rendering_of(task)}, at)

    @staticmethod
    def open(format: str, settings: Settings, paths: Paths) -> Task:
        """See `agcl.tasks.files`."""
        return files.task(files=paths, format=format, **settings)


class HuggingFaceTask(OwnTask):
    """One task from a dataset that the library `datasets` loads."""

    path: Annotated[str, AfterValidator(usable_path)]
    """Folder, or name on the hub (set HF_HUB_OFFLINE=0 for the first download)."""
    name: str | None = None
    """Null takes the last part of the path."""
    subset: str | None = None
    """Configuration of the dataset."""
    revision: str | None = None
    """Commit or tag on the hub. Without it, changes of the dataset there go unnoticed."""
    train: str = "train"
    """Splits in the notation of `datasets`, such as `train[:1000]`."""
    test: str | None = "test"
    """Null scores the training rows."""
    validation: str | None = None


class HuggingFaceTasks(TaskSection, Rendering):
    """Datasets from the Hugging Face hub or from local folders."""

    format: Literal["huggingface"]
    sequence: tuple[HuggingFaceTask, ...] = Field(min_length=1)
    """Tasks in training order."""

    def sources(self, config: "Config") -> list[Source]:
        """A local folder is an input file, whose contents count; a name on the hub is a setting."""
        return [self._source(task) for task in self.sequence]

    def _source(self, task: HuggingFaceTask) -> Source:
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
            **self.rendering_of(task),
        }
        return Source(name, settings, {"folder": folder} if folder.is_dir() else {})

    @staticmethod
    def open(format: str, settings: Settings, paths: Paths) -> Task:
        """See `agcl.tasks.huggingface`."""
        path = paths.get("folder", settings["path"])
        return huggingface.task(**{**settings, "path": str(path)})


TaskFormat = (
    FactsTasks | Concept1KTasks | TraceTasks | ClBenchmarkTasks | FileTasks | HuggingFaceTasks
)


def _absolute(path: Path) -> Path:
    return path.expanduser().absolute()


def _existing(at: dict[str, Path]) -> dict[str, Path]:
    for file in at.values():
        if not file.is_file():
            raise InputError(f"tasks.path: no file {file}")
    return at
