"""`agcl tasks`: what every task is made of, as it will be trained on and scored."""

import argparse
from collections.abc import Sequence
from itertools import pairwise

from rich.console import Console
from rich.markup import escape
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from agcl.model import models
from agcl.tasks import TRAIN, Encoded, EncodedRows
from jobs.tables import table
from pipeline.config import loading
from pipeline.config.resources import Resources
from pipeline.execution.scheduler import run_with_progress
from pipeline.plan.plan import Run
from pipeline.plan.schedule import sessions
from pipeline.results.results import left_out
from pipeline.results.run_folder import summaries, write_log
from pipeline.run import open_run
from pipeline.stages.files import rows_file
from pipeline.stages.prepare import make_tokenizer, prepare

_LONGEST = 600
"""Characters of a prompt that are shown."""


def main(arguments: argparse.Namespace, command: str) -> None:
    """Prepare the tasks where they are not (a run then finds them done) and print them."""
    console = Console(highlight=False)
    config = loading.load(arguments.config, arguments.settings)
    run = open_run(config, weights=False, devices=False)
    prepare_tasks(run, console)
    counted = table(
        ("task", "split"), ("rows", "tokens", "loss tokens", "cut", "too long", "empty")
    )
    prepared = summaries(run)
    for task, summary in prepared.items():
        for split, counts in summary["splits"].items():
            keys = ("rows", "tokens", "answer_tokens", "truncated", "too_long", "empty")
            counted.add_row(escape(task), split, *(f"{counts.get(key, 0):,}" for key in keys))
    console.print(counted)
    console.print(
        "[dim]cut: prompts that lost their beginning (tasks.truncate=left); too long, empty: rows "
        "left out[/]",
        soft_wrap=True,
    )
    for line in left_out({task: summary["splits"] for task, summary in prepared.items()}):
        console.print(f"  {escape(line)}", soft_wrap=True)
    if "tokenizer" in run.resolved:
        run.resolved["tokenizer"].fetch()
    for task in run.plan.tasks:
        resolved = run.resolved[f"prepare/{task}"]
        resolved.fetch()
        tokenizer = models.load_tokenizer(resolved.inputs["tokenizer"])
        rows = EncodedRows(resolved.folder / rows_file(TRAIN))
        scorer = run.plan.scorers[task]
        console.print(
            f"[bold]{escape(task)}[/]: scored by {escape(scorer)}; the loss counts between » and «"
        )
        for index in sorted({0, len(rows) // 2, len(rows) - 1}):
            console.print(f"[dim]row {index + 1}[/]")
            console.print(_example(_parts(rows[index], tokenizer)), soft_wrap=True)


def _parts(row: Encoded, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """The row's text in parts, and whether the loss counts each."""
    edges = [0, *(edge for span in row.spans for edge in span)]
    parts = [row.input_ids[a:b] for a, b in pairwise(edges)]
    return [(tokenizer.decode(ids), bool(n % 2)) for n, ids in enumerate(parts) if ids]


def _example(parts: Sequence[tuple[str, bool]]) -> Text:
    shown = Text()
    for text, counts in parts:
        # A row's escape sequences would reach the terminal.
        text = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
        if counts:
            shown.append("»", "dim").append(text, "green").append("«", "dim")
            continue
        if len(text) > _LONGEST:
            half = _LONGEST // 2
            text = f"{text[:half]} … {len(text) - 2 * half} characters … {text[-half:]}"
        shown.append(text)
    return shown


def prepare_tasks(run: Run, console: Console) -> None:
    """Prepare the run's tasks that are not prepared yet, and run no other stage.

    Raises `StageFailed`.
    """
    run.config.storage.check_writable()
    stages = [stage for stage in run.plan.stages if stage.fn in (prepare, make_tokenizer)]
    todo = sessions({run.config.name: stages}, run.config.storage)
    # Not the run's own folder, where `agcl run` may have workers at the same time.
    aside = run.folder / ".tasks"
    # Not the run's resources: one process tokenizes, without the GPUs, which may be elsewhere.
    failures = run_with_progress(todo, aside, Resources(), lambda records: None, console)
    for failure in failures:
        write_log(run.folder, failure)
        raise failure
