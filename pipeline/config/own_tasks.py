"""The sections of tasks that users bring: files, or what the library `datasets` loads."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from agcl.errors import InputError
from agcl.tasks import files, records
from agcl.tasks.layouts import LAYOUTS, TEMPLATE
from agcl.tasks.template import columns
from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from pipeline.config.section import Place, Section, absolute
from pipeline.config.task_section import Paths, Source, TaskSection

if TYPE_CHECKING:
    from pipeline.config.config import Config


def _readable(template: str) -> str:
    try:
        columns(template)
    except InputError as error:
        raise PydanticCustomError("template", "{reason}", {"reason": str(error)}) from None
    return template


Template = Annotated[str, Field(min_length=1), AfterValidator(_readable)]


Layout = Literal[(TEMPLATE, *LAYOUTS)]  # type: ignore[valid-type]


class Rendering(Section):
    """How a record becomes a prompt and an answer, or a conversation."""

    layout: Layout | None = None
    """`template`: the texts `prompt` and `answer` with column names in braces. `messages`: a list
    of messages (`role`, `content`), perhaps `tools`. `prompt_completion`: columns of those names,
    texts or lists of messages. `alpaca`: `instruction`, perhaps `input`, `output`. `sharegpt`:
    `conversations` of `from` and `value`. Null takes the format if it is one of these, otherwise
    `template`."""
    prompt: Template = "{prompt}"
    """Such as `"{question}\\nAnswer:"`."""
    answer: Template = "{answer}"
    """Such as `" {label}"`; start it with the space that separates it from the prompt."""
    scorer: str = "exact_match"
    """How predictions are scored: a name in `agcl/scoring/scorers.py`, or
    `package.module:function`."""

    def rendering_of(self, task: "OwnTask", *, chat: bool) -> dict[str, Any]:
        """The settings of one task: its own, or else those of the section."""
        layout = task.layout or self._layout
        keys = ("prompt", "answer", "scorer")
        found = {key: getattr(task, key) or getattr(self, key) for key in keys}
        if layout == TEMPLATE:
            return found
        of_layout = {"chat": chat} if layout == "alpaca" else {}
        return {"layout": layout, "scorer": found["scorer"], **of_layout}

    @property
    def _layout(self) -> str:
        format = str(getattr(self, "format", ""))
        return self.layout or (format if format in LAYOUTS else TEMPLATE)


class OwnTask(Section):
    """One task. Its layout, prompt, answer and scorer default to those of the section."""

    layout: Layout | None = None
    prompt: Template | None = None
    answer: Template | None = None
    scorer: str | None = None


class OwnTasks(TaskSection, Rendering):
    """Tasks that users bring."""

    sequence: tuple[OwnTask, ...] = Field(min_length=1)
    """Tasks in training order."""

    @model_validator(mode="after")
    def _check_layouts(self) -> "OwnTasks":
        """Refuse a template that no layout uses, and a layout against the format."""
        format = str(getattr(self, "format", ""))
        if format in LAYOUTS and self._layout != format:
            raise ValueError(f"layout: format {format} is a layout itself; leave it out")
        layouts = [task.layout or self._layout for task in self.sequence]
        for key in ("prompt", "answer"):
            changed = getattr(self, key) != Rendering.model_fields[key].default
            if changed and TEMPLATE not in layouts:
                raise ValueError(f"{key}: layout {layouts[0]} has no templates; leave it out")
            for number, (task, layout) in enumerate(zip(self.sequence, layouts, strict=True)):
                if getattr(task, key) is not None and layout != TEMPLATE:
                    raise ValueError(
                        f"sequence.{number}.{key}: layout {layout} has no templates; leave it out"
                    )
        return self


class FileTask(OwnTask):
    """One task from files: `path`, or a file or folder of files per split."""

    name: str | None = None
    """Null takes the folder's name."""
    path: Place | None = None
    """Folder with `train.jsonl` (or another ending), and perhaps `test` and `validation`."""
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


class FileTasks(OwnTasks):
    """Your own tasks in files, by the type of file, or by the layout of their records.

    `jsonl` is one object per line, or one list. With a layout the file's name tells its type.
    """

    format: Literal[(*records.FORMATS, *LAYOUTS)]  # type: ignore[valid-type]
    sequence: tuple[FileTask, ...] = Field(min_length=1)
    """Tasks in training order."""

    def sources(self, config: "Config") -> Iterator[Source]:
        """Each task has a folder, or a file per split."""
        for task in self.sequence:
            name = task.name or (task.path.name if task.path else "")
            paths = self._in_folder(task.path) if task.path else task.files
            rendering = self.rendering_of(task, chat=self.chat_template)
            yield Source(name, {"name": name, **rendering}, paths)

    def _in_folder(self, folder: Path) -> Paths:
        if not folder.is_dir():
            hint = "; give a file as train" if folder.is_file() else ""
            raise InputError(f"tasks.sequence: no folder {folder}{hint}")
        return files.in_folder(folder, file_format(self.format))


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


class HuggingFaceTasks(OwnTasks):
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
                **self.rendering_of(task, chat=self.chat_template),
            }
            yield Source(name, settings, {"folder": folder} if folder.is_dir() else {})


def file_format(format: str) -> str:
    """The type of files of a format: any for a layout."""
    return records.ANY if format in LAYOUTS else format
