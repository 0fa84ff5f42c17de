"""The config's `tasks`: one section a format, told apart by `format`."""

from typing import Annotated, Literal

from agcl.errors import InputError
from agcl.tasks import trace
from agcl.tasks.template import columns
from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from pipeline.config.section import Place, Positive, Section, Seed, usable_path


def _readable(template: str) -> str:
    try:
        columns(template)
    except InputError as error:
        raise PydanticCustomError("template", "{reason}", {"reason": str(error)}) from None
    return template


Template = Annotated[str, Field(min_length=1), AfterValidator(_readable)]


class TaskSection(Section):
    """What all task formats have in common."""

    max_length: Positive = 512
    """Tokens a row, prompt and answer; longer rows are left out, counted and reported."""
    train_rows: Positive | None = None
    """At most this many training rows a task, drawn by `seed`; null takes all."""
    test_rows: Positive | None = None
    """The same for the rows to score (and, where they are set apart, for validation)."""
    seed: Seed = 0
    """Chooses what is drawn: rows, and the built-in facts; whatever the run's seed is."""
    chat_template: bool = False
    """Render each prompt as a user's message by the tokenizer's chat template."""


class FactsTasks(TaskSection):
    """Built-in synthetic tasks on invented people."""

    format: Literal["facts"] = "facts"
    count: int = Field(4, ge=1, le=100)
    """Number of tasks."""
    entities: int = Field(12, ge=1, le=1000)
    """New people a task; each has four facts."""


class Concept1KTasks(TaskSection):
    """The Concept-1K benchmark: ten tasks of about 1,670 facts."""

    format: Literal["concept1k"]
    path: Place
    """Folder that holds `dataset.txt`."""
    count: int = Field(10, ge=1, le=10)
    """Number of tasks, from the first."""
    concepts_per_task: Positive | None = None
    """Cut every task to its first concepts (about 16 facts each); null keeps all."""


class TraceTasks(TaskSection):
    """TRACE: eight tasks, each with its own scorer."""

    format: Literal["trace"]
    path: Place
    """Folder that holds `<task>/{train,test}.json`, and `eval.json` for validation rows."""
    order: Literal[1, 2] = 1
    """The paper's orders."""
    sequence: tuple[Literal[tuple(trace.SCORERS)], ...] | None = None  # type: ignore[valid-type]
    """Tasks by name, in an order of your own."""

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks in training order."""
        return self.sequence or trace.ORDERS[self.order]


class ClBenchmarkTasks(TaskSection):
    """Classification sets of the O-LoRA benchmark."""

    format: Literal["cl_benchmark"]
    path: Place
    """Folder that holds `instruction_config.json` and `<type>/<set>/{train,test,labels}.json`."""
    sequence: tuple[str, ...] = Field(min_length=1)
    """Sets in training order, such as `[agnews, MNLI]`."""


class Rendering(Section):
    """How a record becomes a prompt and an answer: text with columns in braces."""

    prompt: Template = "{prompt}"
    """Such as `"{question}\\nAnswer:"`."""
    answer: Template = "{answer}"
    """Such as `" {label}"`; begin it with the space that separates it from the prompt."""
    scorer: str = "exact_match"
    """How predictions are scored: a name in `agcl/scoring/scorers.py`, or
    `package.module:function`."""


class OwnTask(Section):
    """A task with settings of its own; what is left out is the section's."""

    prompt: Template | None = None
    answer: Template | None = None
    scorer: str | None = None


class FileTask(OwnTask):
    """One task from files: `path`, or a file or folder of files for every split."""

    name: str | None = None
    """Null takes the folder's name."""
    path: Place | None = None
    """Folder with `train.<format>` and, where there are such rows, `test.` and `validation.`."""
    train: Place | None = None
    test: Place | None = None
    """Rows to score; without it the training rows are."""
    validation: Place | None = None
    """Rows to choose settings by, for `evaluation.validation`; else a share of the training rows is
    set apart."""

    @model_validator(mode="after")
    def _one_place(self) -> "FileTask":
        if (self.path is None) == (self.train is None):
            raise ValueError("train: give either path or train")
        if self.path is not None and (self.test or self.validation):
            raise ValueError("path: goes alone, without test and validation")
        if self.path is None and self.name is None:
            raise ValueError("name: missing")
        return self


class FileTasks(TaskSection, Rendering):
    """Your own tasks: JSON lines (one object a line) or Parquet."""

    format: Literal["jsonl", "parquet"]
    sequence: tuple[FileTask, ...] = Field(min_length=1)
    """Tasks in training order."""


class HuggingFaceTask(OwnTask):
    """One task from a data set that the library `datasets` loads."""

    path: Annotated[str, AfterValidator(usable_path)]
    """Folder, or name on the hub (which needs HF_HUB_OFFLINE=0 for the first download)."""
    name: str | None = None
    """Null takes the last part of the path."""
    subset: str | None = None
    """Configuration of the data set."""
    revision: str | None = None
    """Commit or tag on the hub. Without it a data set that changes there goes unnoticed."""
    train: str = "train"
    """Splits, in the notation of `datasets`: `train[:1000]`."""
    test: str | None = "test"
    """Null scores the training rows."""
    validation: str | None = None


class HuggingFaceTasks(TaskSection, Rendering):
    """Data sets of the Hugging Face hub, or local ones."""

    format: Literal["huggingface"]
    sequence: tuple[HuggingFaceTask, ...] = Field(min_length=1)
    """Tasks in training order."""


TaskFormat = (
    FactsTasks | Concept1KTasks | TraceTasks | ClBenchmarkTasks | FileTasks | HuggingFaceTasks
)
