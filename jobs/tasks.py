"""`agcl tasks`: what every task is made of, as it will be trained on and scored."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

_LONGEST = 600
"""Characters of a prompt that are shown."""


def main(arguments: argparse.Namespace, command: str) -> int:
    """Prepare the tasks where they are not (a run then finds them done) and print them."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from agcl.model import models
    from agcl.tasks import TRAIN, EncodedRows
    from pipeline.config import loading
    from pipeline.errors import StageFailed
    from pipeline.results.run_folder import summaries
    from pipeline.run import open_run, prepare_tasks

    console = Console(highlight=False)
    run = open_run(loading.load(arguments.config, arguments.settings))
    try:
        prepare_tasks(run, console)
    except StageFailed as failure:
        Console(stderr=True, soft_wrap=True).print(f"agcl: {failure}", markup=False)
        return 1
    table = Table(box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column("task")
    table.add_column("rows")
    for column in ("number", "tokens", "loss tokens", "too long", "empty"):
        table.add_column(column, justify="right")
    prepared = summaries(run)
    for task, summary in prepared.items():
        for split, counts in summary["splits"].items():
            keys = ("rows", "tokens", "answer_tokens", "too_long", "empty")
            table.add_row(escape(task), split, *(f"{counts[key]:,}" for key in keys))
    console.print(table)
    if "tokenizer" in run.resolved:
        run.resolved["tokenizer"].fetch()
    for task in run.plan.tasks:
        work = run.resolved[f"prepare/{task}"]
        work.fetch()
        tokenizer = models.load_tokenizer(work.inputs["tokenizer"])
        rows = EncodedRows(work.folder / f"{TRAIN}.arrow")
        scorer = prepared[task]["scorer"]
        console.print(
            f"[bold]{escape(task)}[/]: scored by {escape(scorer)}; the loss counts between » and «"
        )
        for index in sorted({0, len(rows) // 2, len(rows) - 1}):
            ids, prompt_tokens = rows[index]
            prompt = tokenizer.decode(ids[:prompt_tokens])
            example = _example(prompt, tokenizer.decode(ids[prompt_tokens:]))
            console.print(f"[dim]row {index + 1}[/]")
            console.print(example, soft_wrap=True)
    return 0


def _example(prompt: str, answer: str) -> "Text":
    from rich.text import Text

    prompt, answer = (
        "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
        for text in (prompt, answer)  # A row's escape sequences would reach the terminal.
    )
    if len(prompt) > _LONGEST:
        half = _LONGEST // 2
        left_out = len(prompt) - 2 * half
        prompt = f"{prompt[:half]} … {left_out} characters … {prompt[-half:]}"
    return Text.assemble(prompt, ("»", "dim"), (answer, "green"), ("«", "dim"))
