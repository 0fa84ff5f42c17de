"""`agcl tasks`: what every task is made of, as it will be trained on and scored."""

import argparse

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from agcl.model import models
from agcl.tasks import TRAIN, EncodedRows
from jobs.tables import table
from pipeline.config import loading
from pipeline.results.results import left_out
from pipeline.results.run_folder import summaries
from pipeline.run import open_run, prepare_tasks

_LONGEST = 600
"""Characters of a prompt that are shown."""


def main(arguments: argparse.Namespace, command: str) -> None:
    """Prepare the tasks where they are not (a run then finds them done) and print them."""
    console = Console(highlight=False)
    run = open_run(loading.load(arguments.config, arguments.settings))
    prepare_tasks(run, console)
    counted = table(("task", "rows"), ("number", "tokens", "loss tokens", "too long", "empty"))
    prepared = summaries(run)
    for task, summary in prepared.items():
        for split, counts in summary["splits"].items():
            keys = ("rows", "tokens", "answer_tokens", "too_long", "empty")
            counted.add_row(escape(task), split, *(f"{counts[key]:,}" for key in keys))
    console.print(counted)
    for line in left_out({task: summary["splits"] for task, summary in prepared.items()}):
        console.print(f"  {escape(line)}", soft_wrap=True)
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


def _example(prompt: str, answer: str) -> Text:
    prompt, answer = (
        "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
        for text in (prompt, answer)  # A row's escape sequences would reach the terminal.
    )
    if len(prompt) > _LONGEST:
        half = _LONGEST // 2
        left_out = len(prompt) - 2 * half
        prompt = f"{prompt[:half]} … {left_out} characters … {prompt[-half:]}"
    return Text.assemble(prompt, ("»", "dim"), (answer, "green"), ("«", "dim"))
