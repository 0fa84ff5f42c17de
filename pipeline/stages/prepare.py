"""Prepare: a task's rows, rendered and tokenized by Ray Data, into memory-mapped Arrow files."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from agcl.model import models
from agcl.tasks import SCHEMA, Row, RowSource, encode, is_empty
from transformers import PreTrainedTokenizerBase

from pipeline.config.sources import open_task
from pipeline.stages.context import Context
from pipeline.storage.artifact import write_json

_BLOCK_ROWS, _BLOCK_BYTES = 1024, 2**20
"""Rows that are read, and text that is tokenized, at a time: what bounds memory."""
SUMMARY = "summary.json"
COUNTS = ("rows", "tokens", "answer_tokens", "too_long", "empty")
"""Counts of a split: what is kept, and the rows left out by reason."""
FILES = "file/"
"""Prefix of the inputs that are a task's files."""


def make_tokenizer(
    config: Mapping[str, Any], inputs: Mapping[str, Path], out_dir: Path, context: Context
) -> None:
    """The built-in model's tokenizer, trained on its generic facts."""
    rows = open_task(config["task"], {}).splits["train"]()
    models.builtin_tokenizer(row.prompt + row.answer for row in rows).save_pretrained(out_dir)


def prepare(
    config: Mapping[str, Any], inputs: Mapping[str, Path], out_dir: Path, context: Context
) -> None:
    """Write `<split>.arrow` for every split and `summary.json` with counts.

    Rows stream through Ray Data in order and are never whole in memory. Rows without a prompt or
    an answer, and those longer than `max_length` tokens, are left out and counted.
    """
    tokenizer = models.load_tokenizer(inputs["tokenizer"])
    files = {r.removeprefix(FILES): path for r, path in inputs.items() if r.startswith(FILES)}
    task = open_task(config["task"], files, config["selection"])
    summary: dict[str, dict[str, int]] = {}
    encoded = _encoded_by_ray if context.ray_data else _encoded_here
    for split, source in task.splits.items():
        counts = dict.fromkeys(COUNTS, 0)
        with (
            pa.OSFile(str(out_dir / f"{split}.arrow"), "wb") as sink,
            pa.ipc.new_file(sink, SCHEMA) as writer,
        ):
            for table in encoded(source, tokenizer, chat=config["chat_template"]):
                writer.write_table(_usable(table, config["max_length"], counts))
                context.log({"rows": counts["rows"]}, counts["rows"])
        if not counts["rows"]:
            raise ValueError(
                f"task {task.name}: no {split} row has at most {config['max_length']} tokens "
                "(tasks.max_length)"
            )
        summary[split] = counts
    write_json(
        out_dir / SUMMARY,
        {"splits": summary, "scored": dict(task.scored), "scorer": task.scorer},
    )


def _encoded_here(
    source: RowSource, tokenizer: PreTrainedTokenizerBase, *, chat: bool
) -> Iterator[pa.Table]:
    for block in _blocks(source):
        yield _encode_block(block, tokenizer, chat=chat)


def _encoded_by_ray(
    source: RowSource, tokenizer: PreTrainedTokenizerBase, *, chat: bool
) -> Iterator[pa.Table]:
    import ray.data

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.target_max_block_size = _BLOCK_BYTES
    # Without a claim to CPUs, which workers may hold already while they wait for these rows.
    dataset = ray.data.read_datasource(
        _source_of(partial(_blocks, source)), override_num_blocks=1, num_cpus=0
    ).map_batches(
        partial(_encode_block, tokenizer=tokenizer, chat=chat),
        batch_format="pyarrow",
        batch_size=None,
        num_cpus=0,
    )
    for table in dataset.iter_batches(batch_format="pyarrow", batch_size=None):
        yield table.cast(SCHEMA)


def _source_of(blocks: Callable[[], Iterator[pa.Table]]) -> Any:
    """A Ray Data source of one streaming read task."""
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask

    class Rows(Datasource):
        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]

        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
            unknown = BlockMetadata(
                num_rows=None, size_bytes=None, input_files=None, exec_stats=None
            )
            return [ReadTask(blocks, unknown)]

    return Rows()


def _blocks(source: RowSource) -> Iterator[pa.Table]:
    rows = source()
    while block := list(islice(rows, _BLOCK_ROWS)):
        yield pa.table(
            {"prompt": [row.prompt for row in block], "answer": [row.answer for row in block]}
        )


def _encode_block(table: pa.Table, tokenizer: PreTrainedTokenizerBase, chat: bool) -> pa.Table:
    texts = zip(table["prompt"].to_pylist(), table["answer"].to_pylist(), strict=True)
    return encode(tokenizer, [Row(prompt, answer) for prompt, answer in texts], chat=chat)


def _usable(table: pa.Table, max_length: int, counts: dict[str, int]) -> pa.Table:
    """The rows that are kept; adds to the counts."""
    rows = zip(table["prompt"].to_pylist(), table["answer"].to_pylist(), strict=True)
    filled = pa.array([not is_empty(Row(*row)) for row in rows])
    there = table.filter(filled)
    kept = there.filter(pc.less_equal(pc.list_value_length(there["input_ids"]), max_length))
    tokens = pc.sum(pc.list_value_length(kept["input_ids"])).as_py() or 0
    counts["rows"] += kept.num_rows
    counts["tokens"] += tokens
    counts["answer_tokens"] += tokens - (pc.sum(kept["prompt_tokens"]).as_py() or 0)
    counts["too_long"] += there.num_rows - kept.num_rows
    counts["empty"] += table.num_rows - there.num_rows
    return kept
