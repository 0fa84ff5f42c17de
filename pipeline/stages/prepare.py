"""Prepare: render and tokenize a task's rows with Ray Data into memory-mapped Arrow files."""

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from agcl.model import models
from agcl.model.builtin import builtin_tokenizer
from agcl.tasks import SCHEMA, VALIDATION, Row, RowSource, encode, is_empty
from agcl.tasks.encoding import cut_left, encoded_rows
from agcl.tasks.selection import select, tests_training_rows
from transformers import PreTrainedTokenizerBase

from pipeline.config.sources import open_task
from pipeline.stages.context import Context
from pipeline.stages.files import SUMMARY, named, rows_file
from pipeline.storage.artifact import write_json

_BLOCK_ROWS, _BLOCK_BYTES = 1024, 2**20
"""Rows read at a time, and bytes of text tokenized at a time. They bound the memory."""
COUNTS = ("rows", "tokens", "answer_tokens", "truncated", "too_long", "empty")
"""Per split: rows and tokens that are kept, kept rows that were cut, and rows that are dropped, by
reason. Answer tokens are those with loss, earlier turns of conversations included."""
FILES = "file/"
"""Prefix of the roles of inputs that are a task's files."""


def make_tokenizer(
    config: Mapping[str, Any], inputs: Mapping[str, Path], out_dir: Path, context: Context
) -> None:
    """Train the built-in model's tokenizer on its generic facts."""
    rows = open_task(config["task"], {}).splits["train"]()
    builtin_tokenizer(row.prompt + row.answer for row in rows).save_pretrained(out_dir)


def prepare(
    config: Mapping[str, Any], inputs: Mapping[str, Path], out_dir: Path, context: Context
) -> None:
    """Write `<split>.arrow` for every split, and `summary.json` with counts.

    `summary.json` also says whether the chat template rendered any rows (`conversations`).

    Rows stream through Ray Data in order; a split is never in memory as a whole. Rows without a
    prompt or an answer, and rows longer than `max_length` tokens, are dropped and counted. With
    `truncate: left` the beginning of a long row's prompt, behind any instruction, is cut if its
    answer fits. A task whose test rows are its training rows gets no validation split: evaluate
    takes a share of them.
    """
    tokenizer = models.load_tokenizer(inputs["tokenizer"])
    selection, files = dict(config["selection"]), named(FILES, inputs)
    task = open_task(config["task"], files)
    wants_rows = selection["validation"] and VALIDATION not in task.splits
    if wants_rows and tests_training_rows(task):
        selection["validation"] = 0.0
    task = select(task, **selection)
    summary: dict[str, dict[str, int]] = {}
    conversations = False
    done = 0
    cut = config["truncate"] == "left"
    encoded = _encoded_by_ray if context.ray_data else _encoded_here
    for split, source in task.splits.items():
        counts = dict.fromkeys(COUNTS, 0)
        with (
            pa.OSFile(str(out_dir / rows_file(split)), "wb") as sink,
            pa.ipc.new_file(sink, SCHEMA) as writer,
        ):
            for table in encoded(source, tokenizer, chat=config["chat_template"]):
                counts["empty"] += table.num_rows
                table = _spoken(table)
                counts["empty"] -= table.num_rows
                if cut:
                    table = _cut(table, config["max_length"], tokenizer, counts)
                table = _short(table, config["max_length"], counts)
                conversations |= table["earlier"].null_count < table.num_rows
                writer.write_table(table)
                done += table.num_rows
                context.log({"rows": done}, done)
        if not counts["rows"]:
            raise ValueError(
                f"task {task.name}: no {split} row has at most {config['max_length']} tokens "
                "(tasks.max_length, or fewer that the model has positions for)"
            )
        summary[split] = counts
        if counts["too_long"]:  # Said before hours of training without them.
            advice = "" if cut else "; tasks.truncate=left cuts their prompts instead"
            context.warn(
                f"{counts['too_long']} {split} rows are longer than {config['max_length']} tokens "
                f"and are left out{advice}"
            )
    found = {"splits": summary, "scored": dict(task.scored), "conversations": conversations}
    write_json(out_dir / SUMMARY, found)


def _encoded_here(
    source: RowSource, tokenizer: PreTrainedTokenizerBase, *, chat: bool
) -> Iterator[pa.Table]:
    rows = source()
    while block := list(islice(rows, _BLOCK_ROWS)):
        yield encode(tokenizer, block, chat=chat)


def _encoded_by_ray(
    source: RowSource, tokenizer: PreTrainedTokenizerBase, *, chat: bool
) -> Iterator[pa.Table]:
    import ray.data

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.raise_original_map_exception = True  # It names the file and row.
    context.target_max_block_size = _BLOCK_BYTES
    # One streaming task. num_cpus=0, because workers that wait for these rows may hold all CPUs.
    dataset: Any = ray.data.from_items([None]).map_batches(
        lambda _: _encoded_here(source, tokenizer, chat=chat),
        batch_format="pyarrow",
        batch_size=None,
        num_cpus=0,
    )
    for table in dataset.iter_batches(batch_format="pyarrow", batch_size=None):
        yield table.cast(SCHEMA)


def _spoken(table: pa.Table) -> pa.Table:
    """The rows with a prompt and an answer."""
    rows = zip(table["prompt"].to_pylist(), table["answer"].to_pylist(), strict=True)
    filled = pa.array([not is_empty(Row(*row)) for row in rows], pa.bool_())
    # A chat template or tokenizer can strip a prompt, or an answer before its end token, to none.
    answers = pc.subtract(pc.list_value_length(table["input_ids"]), table["prompt_tokens"])
    spoken = pc.and_(pc.greater(table["prompt_tokens"], 0), pc.greater(answers, 1))
    return table.filter(pc.and_(filled, spoken))


def _cut(
    table: pa.Table, length: int, tokenizer: PreTrainedTokenizerBase, counts: dict[str, int]
) -> pa.Table:
    """The rows with long prompts cut at their beginning. A row that stays long is left as it is."""
    special = set(tokenizer.all_special_ids)
    rows = list(encoded_rows(table))
    for index, row in enumerate(rows):
        if len(row.input_ids) <= length:
            continue
        if short := cut_left(row, length, special, table["kept"][index].as_py()):
            rows[index] = short
            counts["truncated"] += 1
    by_chat = zip(rows, table["earlier"].to_pylist(), strict=True)
    columns: dict[str, list[Any]] = {
        "input_ids": [row.input_ids for row in rows],
        "prompt_tokens": [row.prompt_tokens for row in rows],
        "earlier": [None if earlier is None else row.earlier for row, earlier in by_chat],
    }
    for name, values in columns.items():
        field = SCHEMA.field(name)
        table = table.set_column(
            table.schema.get_field_index(name), field, pa.array(values, field.type)
        )
    return table


def _short(table: pa.Table, max_length: int, counts: dict[str, int]) -> pa.Table:
    """The rows to keep. Adds to the counts."""
    kept = table.filter(pc.less_equal(pc.list_value_length(table["input_ids"]), max_length))
    counts["rows"] += kept.num_rows
    counts["tokens"] += pc.sum(pc.list_value_length(kept["input_ids"])).as_py() or 0
    counts["answer_tokens"] += sum(row.loss_tokens for row in encoded_rows(kept))
    counts["too_long"] += table.num_rows - kept.num_rows
    return kept
