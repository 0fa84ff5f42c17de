"""Checks of a config's data before any work: every row of every task, probes and texts."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

from agcl.errors import InputError
from agcl.files.pointers import check_pulled
from agcl.model import models
from agcl.scoring import probes
from agcl.scoring.scorers import scorer_named
from agcl.tasks import (
    TEST,
    VALIDATION,
    Row,
    Task,
    check_names,
    check_rows,
    encode,
    is_empty,
)
from agcl.tasks.encoding import encoded_rows
from agcl.tasks.messages import kinds_of_turns
from agcl.tasks.selection import position
from transformers import PreTrainedTokenizerBase

from pipeline.config.config import Config
from pipeline.config.row_lengths import max_length
from pipeline.config.sources import (
    base_rows,
    held_out_sources,
    open_task,
    selection,
    sources,
    text_files,
)
from pipeline.config.task_section import Source
from pipeline.storage.artifact import folder_name

_CHECKED: set[str] = set()
"""The sources whose rows were checked by this process."""
_ROWS_AT_A_TIME = 16


def check_data(config: Config) -> None:
    """Raise `InputError`, one line that names the file, row or key, for the first bad input."""
    tasks = _open_tasks(config)
    for task in tasks:
        scorer_named(task.scorer, f"tasks.scorer (task {task.name})")
    _check_evaluation(config, tasks)
    _check_base(config)


@contextmanager
def at_key(key: str) -> Iterator[None]:
    """Put the config key before the message of an `InputError`."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{key}: {error}") from None


def _open_tasks(config: Config) -> list[Task]:
    """The tasks of the sequence, with names that can be used for folders."""
    found = sources(config)
    names = [source.name for source in found]
    check_names(names)
    taken = {source.name for source in held_out_sources(config)}
    by_folder: dict[str, str] = {}
    for name in names:
        if name in taken:
            raise InputError(f"task name {name!r} is taken by a held-out set")
        other = by_folder.setdefault(folder_name(name), name)
        if other != name:
            raise InputError(
                f"task names {other!r} and {name!r} give the same folder name, in which unusual "
                "characters become _; rename one"
            )
    return [_open_task(config, source, "tasks") for source in found]


def _open_task(config: Config, source: Source, section: str) -> Task:
    """A task whose rows were checked."""
    for path in source.files.values():
        with at_key(f"{section}.sequence (task {source.name})"):
            check_pulled(path)
    chosen = selection(config, source)
    task = open_task(source.settings, source.files, chosen)
    stamps = {role: (str(path), _stamp(path)) for role, path in source.files.items()}
    encoding = config.tasks.model_dump(include={"chat_template", "max_length", "truncate"})
    key = json.dumps([source.settings, chosen, stamps, encoding, config.model.path], sort_keys=True)
    if key not in _CHECKED:  # The runs of a comparison have the same tasks.
        check = _conversation_check(config)
        for split in task.splits:
            file = source.files.get(split)
            check_rows(task, split, check, file=str(file or ""))
            _check_length(config, task, split, file)
        _CHECKED.add(key)
    return task


def _check_length(config: Config, task: Task, split: str, file: Path | None) -> None:
    """Refuse a split in which no row fits the length limit; usually reads only a few rows."""
    if config.model.is_builtin or config.tasks.truncate == "left":
        return
    limit, shortest = max_length(config), 0
    tokenizer = _tokenizer(config.model.folder)
    rows = (row for row in task.splits[split]() if not is_empty(row))
    while block := list(islice(rows, _ROWS_AT_A_TIME)):
        encoded = encoded_rows(encode(tokenizer, block, chat=config.tasks.chat_template))
        length = min(len(row.input_ids) for row in encoded)
        if length <= limit:
            return
        shortest = min(shortest or length, length)
    raise InputError(
        f"task {task.name}: all rows of {file or f'the {split} split'} are longer than {limit} "
        f"tokens, the shortest has {shortest}: "
        + (
            "tasks.truncate=left cuts prompts to what the model has positions for"
            if limit == models.positions(config.model.folder)
            else "raise tasks.max_length, or cut prompts with tasks.truncate=left"
        )
    )


def _conversation_check(config: Config) -> Callable[[Row], None]:
    """A check whether the chat template renders a row's kinds of turns.

    Once per kind: rendering every row would take as long as preparing them does.
    """
    seen: set[str] = set()

    def check(row: Row) -> None:
        if row.conversation and not seen.issuperset(kinds := kinds_of_turns(row.conversation)):
            seen.update(kinds)
            if config.model.is_builtin:
                raise InputError(
                    f"{row.conversation.place}: messages need a chat template, which the builtin "
                    "model's tokenizer does not have; set model.path"
                )
            encode(_tokenizer(config.model.folder), [row])

    return check


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return _tokenizer_as_of(folder, tuple(_stamp(folder)))


@cache
def _tokenizer_as_of(folder: Path, stamp: tuple[Any, ...]) -> PreTrainedTokenizerBase:
    return models.load_tokenizer(folder)


def _stamp(path: Path) -> list[Any]:
    """Size and modification time of a file, or of a folder's files by name."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]


def _check_evaluation(config: Config, tasks: list[Task]) -> None:
    for scorer in config.evaluation.scorers:
        scorer_named(scorer, "evaluation.scorers")
    common = set.intersection(*(set(task.scored) for task in tasks))
    if not common - {VALIDATION}:
        first = set(tasks[0].scored)
        other = next(task for task in tasks if not first.intersection(task.scored) - {VALIDATION})
        pair = (tasks[0], other) if TEST in first else (other, tasks[0])
        raise InputError(
            "tasks.sequence: task {} has test rows and task {} has none; every task needs a test "
            "file, or none does".format(*(task.name for task in pair))
        )
    wanted = config.evaluation.set
    if wanted is not None and wanted not in common:
        raise InputError(
            f"evaluation.set: not every task has a set {wanted!r} (all have "
            f"{', '.join(sorted(common))})"
        )
    for task in tasks:
        if task.memorized and VALIDATION not in task.scored:
            _check_share(task, config.evaluation.validation)
    for probe in config.evaluation.probes:
        with at_key("evaluation.probes"):
            check_pulled(probe)
            probes.read(probe)
    if (file := config.evaluation.text) and not _has_text(file, "evaluation.text", whole=True):
        raise InputError(f"evaluation.text: {file} is empty")


def _check_share(task: Task, share: float) -> None:
    """Refuse a validation share that leaves no test row or no validation row."""
    for name, split in task.scored.items() if share else ():
        rows = (row for row in task.splits[split]() if not is_empty(row))
        sides = {position(row, seed=0) < share for row in rows}
        if len(sides) < 2:
            missing = "test" if True in sides else "validation"
            raise InputError(
                f"evaluation.validation: {share} leaves no {missing} row in {name} of task "
                f"{task.name}; choose another share"
            )


def _has_text(file: Path, key: str, *, whole: bool = False) -> bool:
    """Whether a file holds more than white space. Reads up to the first text, or the `whole`.

    Raises `InputError` if it cannot be read as UTF-8 so far.
    """
    with at_key(key):
        check_pulled(file)
    try:
        with file.open(encoding="utf-8-sig") as text:
            found = any(part.strip() for part in iter(partial(text.read, 1000), ""))
            while whole and text.read(2**20):
                pass
            return found
    except OSError as error:
        raise InputError(f"{key}: {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{key}: {file} is not UTF-8 text") from None


def _check_base(config: Config) -> None:
    if config.base.protect == "text" and config.base.text:
        with at_key("base.text"):
            files = text_files(config.base.text)
        with_text = [_has_text(file, "base.text") for file in files]
        if not any(with_text):
            raise InputError(f"base.text: no text in {config.base.text}")
    if given := base_rows(config):
        for source in sources(given):
            _open_task(given, source, "base.rows")
