"""The config's `tasks`: one section per format, which says what each task is made from.

A new format is a module in `agcl/tasks/`, and here a section, added to `TaskFormat` and to `OPEN`.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from agcl.errors import InputError
from agcl.tasks import Task, cl_benchmark, concept1k, facts, files, huggingface, trace
from agcl.tasks.template import columns
from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from pipeline.config.section import Place, Positive, Section, Seed, absolute

if TYPE_CHECKING:
    from pipeline.config.config import Config

Settings = Mapping[str, Any]
Paths = Mapping[str, Path]


@dataclass(frozen=True)
class Source:
    """What a task is made from."""

    name: str
    settings: Settings
    """JSON that `OPEN` takes; `sources.sources` adds the `format`."""
    files: Paths = field(default_factory=dict)
    """By role. Fingerprints cover their contents, not their paths."""


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
    """Maximum tokens per row, prompt and answer together; longer rows are dropped and counted. A
    model with fewer positions lowers it."""
    train_rows: Positive | None = None
    """Maximum training rows per task, sampled by `seed`; null takes all."""
    test_rows: Positive | None = None
    """Maximum test rows per task, and maximum validation rows where a task has them."""
    seed: Seed = 0
    """Seed for sampling rows and for the built-in facts. Independent of the run's `seed`."""
    chat_template: bool = False
    """Render each prompt as a user message with the tokenizer's chat template."""

    @abstractmethod
    def sources(self, config: "Config") -> Iterator[Source]:
        """The tasks in training order. Raises `InputError` for a missing file or folder."""


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

    @property
    def files(self) -> Paths:
        """The files by split, if they are given one by one."""
        given = {split: getattr(self, split) for split in files.SPLITS}
        return {split: path for split, path in given.items() if path is not None}


class FileTasks(TaskSection, Rendering):
    """Your own tasks: JSON lines (one object per line) or Parquet."""

    format: Literal["jsonl", "parquet"]
    sequence: tuple[FileTask, ...] = Field(min_length=1)
    """Tasks in training order."""

    def sources(self, config: "Config") -> Iterator[Source]:
        """Each task has a folder, or a file per split."""
        for task in self.sequence:
            name = task.name or (task.path.name if task.path else "")
            paths = self._in_folder(task.path) if task.path else task.files
            yield Source(name, {"name": name, **self.rendering_of(task)}, paths)

    def _in_folder(self, folder: Path) -> Paths:
        if not folder.is_dir():
            hint = "; give a file as train" if folder.is_file() else ""
            raise InputError(f"tasks.sequence: no folder {folder}{hint}")
        paths = {split: folder / f"{split}.{self.format}" for split in files.SPLITS}
        return {s: path for s, path in paths.items() if path.exists() or s == "train"}


def _folder_or_name(path: str) -> str:
    folder = absolute(Path(path))
    return str(folder) if folder.is_dir() else path


class HuggingFaceTask(OwnTask):
    """One task from a dataset that the library `datasets` loads."""

    path: Annotated[str, AfterValidator(_folder_or_name)]
    """Folder, or name on the hub (`HF_TOKEN` opens private ones)."""
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

    def sources(self, config: "Config") -> Iterator[Source]:
        """A local folder is an input, whose contents count; a name on the hub is a setting."""
        for task in self.sequence:
            folder = Path(task.path)
            name = task.name or Path(task.path).name
            splits = {split: getattr(task, split) for split in files.SPLITS}
            settings = {
                "name": name,
                "path": "" if folder.is_dir() else task.path,
                "subset": task.subset,
                "revision": task.revision,
                "splits": {ours: theirs for ours, theirs in splits.items() if theirs},
                **self.rendering_of(task),
            }
            yield Source(name, settings, {"folder": folder} if folder.is_dir() else {})


TaskFormat = (
    FactsTasks | Concept1KTasks | TraceTasks | ClBenchmarkTasks | FileTasks | HuggingFaceTasks
)
OPEN: dict[str, Callable[[Settings, Paths], Task]] = {
    "facts": lambda settings, paths: facts.task(**settings),
    "facts-base": lambda settings, paths: facts.base(**settings),
    "concept1k": lambda settings, paths: concept1k.task(file=paths["file"], **settings),
    "trace": lambda settings, paths: trace.task(files=paths, **settings),
    "cl_benchmark": lambda settings, paths: cl_benchmark.task(files=paths, **settings),
    "jsonl": lambda settings, paths: files.task(files=paths, format="jsonl", **settings),
    "parquet": lambda settings, paths: files.task(files=paths, format="parquet", **settings),
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
