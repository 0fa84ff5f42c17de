"""`agcl init`: write a commented config for a model and data files, after looking at them."""

import argparse
import math
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import jinja2
import torch
import yaml
from rich.console import Console
from rich.markup import escape
from transformers.utils import logging

from agcl.errors import InputError
from agcl.model import models
from agcl.model.check import check_folder
from agcl.tasks import TRAIN
from agcl.tasks.chat_template import can_teach
from pipeline.config import hub, loading
from pipeline.config.check import check_inputs
from pipeline.config.detect_format import Data, look_at
from pipeline.config.model import Model
from pipeline.config.recommended import rate_text, usual
from pipeline.config.revision import pinned
from pipeline.execution.progress import warn

_TEMPLATE = Path(__file__).with_suffix(".yaml.j2")
_EXPENSIVE = 4096
"""Tokens. If a few rows are longer, they are left out rather than every batch made for them."""

_LONGEST_NAME = 80
"""Characters of a run's name, of 100 that it may have: the user may want to add some."""

_LONG_ANSWER = 16
"""Median tokens of an answer above which `rouge_l` is proposed: exact matches are rare."""


def main(arguments: argparse.Namespace, command: str) -> None:
    """Look at the model and the data, write the config, and check it as `agcl run` would.

    Raises `InputError` for what cannot be read, for data of several formats, and if the file
    exists.
    """
    file: Path = arguments.output
    if file.exists():
        raise InputError(f"{file} exists; name another with --output")
    model = _model(arguments.model, arguments.revision)
    logging.disable_progress_bar()
    tokenizer = check_folder(model.folder, weights=not model.on_hub)
    chat, positions = can_teach(tokenizer), models.positions(model.folder)
    data = [look_at(path, tokenizer, chat=chat) for path in arguments.data]
    held_out = {f for each in data for split, f in each.files.items() if split != TRAIN}
    data = [each for each in data if each.files[TRAIN] not in held_out]  # Of data/*.jsonl.
    _check_together(data)
    lengths = sorted(length for each in data for length in each.lengths)
    longest = max(each.longest for each in data)
    limit = min(positions, _max_length(lengths, longest))
    if lengths[0] > limit:
        raise InputError(
            f"all rows have more tokens than the model has positions, {limit}: the shortest has "
            f"{lengths[0]}"
        )
    long = median(length for each in data for length in each.answers) > _LONG_ANSWER
    gpu, num_weights = torch.cuda.is_available(), models.num_weights(model.folder)
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["rate"] = rate_text
    environment.filters["quoted"] = _quoted
    text = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        file=file,
        name=_run_name([each.name for each in data]),
        model=arguments.model,
        revision=arguments.revision,
        num_weights=num_weights,
        chat=chat,
        template="a" if chat else "an unusable" if tokenizer.chat_template else "no",
        data=data,
        lengths=lengths,
        longest=longest,
        scorer="rouge_l" if long else "exact_match",
        other_scorer="exact_match" if long else "rouge_l",
        max_length=limit,
        usual=usual(num_weights, lora=False),
        precision="bfloat16" if gpu else "float32",
        gpus=int(gpu),
    )
    with TemporaryDirectory() as scratch:
        aside = Path(scratch) / "config.yaml"
        aside.write_text(text, encoding="utf-8")
        check_inputs(pinned(loading.load(aside), ()), weights=not model.on_hub)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    console = Console(highlight=False, soft_wrap=True)
    for each in data:
        if each.unused:
            warn(console, f"{each.name}: columns that are not trained on: {each.unused}")
        if too_long := sum(length > limit for length in each.lengths):
            warn(
                console,
                f"{each.name}: {too_long} of the {len(each.lengths)} rows looked at have more than "
                f"{limit} tokens and would be left out: tasks.truncate=left cuts their prompts",
            )
        elif each.longest > limit:
            warn(
                console,
                f"{each.name}: the longest row has {each.longest} tokens; rows with more than "
                f"{limit} would be left out: tasks.truncate=left cuts their prompts",
            )
        files = ", ".join(each.files)
        console.print(f"  {escape(each.name)}: {escape(each.said)}; {files}")
    console.print(f"wrote {escape(str(file))}; read it, then: agcl tasks {escape(str(file))}")


def _run_name(tasks: Sequence[str]) -> str:
    """A name from the first and the last task's."""
    ends = dict.fromkeys((tasks[0], tasks[-1]))
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(ends)).strip("-._")
    return name[:_LONGEST_NAME].rstrip("-._") or "run"


def _quoted(text: str) -> str:
    """A text in YAML's quotes. JSON's would split what is beyond 16 bits into two escapes."""
    quoted: str = yaml.dump(text, default_style='"', allow_unicode=True, width=math.inf)
    return quoted.strip()


def _check_together(data: Sequence[Data]) -> None:
    """Raise `InputError` for tasks that cannot be in one sequence, in terms of their files."""
    first, *others = data
    for other in others:
        one, another = first.files["train"], other.files["train"]
        if (other.format, other.templates) != (first.format, first.templates):
            raise InputError(
                f"{another} has another format than {one} ({other.said} and {first.said}); the "
                "tasks of a sequence share one (messages can hold all: a prompt is a user's turn)"
            )
        if ("test" in first.files) != ("test" in other.files):
            with_test, without = (one, another) if "test" in first.files else (another, one)
            raise InputError(
                f"{with_test} has a test file beside it, but {without} has none; every task needs "
                "one, or none does (NAME-test.jsonl beside NAME.jsonl, or test.jsonl in a folder)"
            )
    by_name: dict[str, str] = {}
    for each in data:
        if each.name in by_name:
            raise InputError(
                f"{by_name[each.name]} and {each.files['train']} both give a task named "
                f"{each.name}; rename one"
            )
        by_name[each.name] = each.files["train"]


def _model(path: str, revision: str | None) -> Model:
    """The model; of one on the hub, all but the weights is downloaded."""
    config = loading.validate({"method": "sequential", "model": _given(path, revision)})
    model = pinned(config, ()).model
    if model.is_builtin:
        raise InputError("the builtin model has the config facts: agcl run facts")
    if model.on_hub:
        asked, commit = hub.parts(model.revision)
        hub.fetch(model.path, str(commit), asked, weights=False)
    return model


def _given(path: str, revision: str | None) -> dict[str, str]:
    return {"path": path, **({"revision": revision} if revision else {})}


def _max_length(lengths: list[int], longest: int) -> int:
    """A limit that all rows fit in, or nearly all if some are expensively long."""
    if longest > _EXPENSIVE:
        longest = max(_EXPENSIVE, lengths[int(0.99 * (len(lengths) - 1))])
    return -(-longest // 64) * 64
