"""Prepare: a task's rows, rendered and tokenized by Ray Data, into memory-mapped Arrow files."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from agcl import models
from agcl.tasks import SCHEMA, Row, RowSource, Task, concept1k, encode, facts, jsonl
from transformers import PreTrainedTokenizerBase

from pipeline.artifact import write_json
from pipeline.stages.context import Context

_BLOCK_ROWS = 1024
SUMMARY = "summary.json"
FILE_KEYS = ("file", "train", "test")
"""Keys of a task's source that name files; in a stage they are inputs."""


def open_task(source: Mapping[str, Any]) -> Task:
    """The task that a stage's config describes; `format` says which other keys there are."""
    match source["format"]:
        case "facts":
            return facts.task(
                source["index"],
                entities=source["entities"],
                base_entities=source["base_entities"],
                seed=source["seed"],
            )
        case "facts-base":
            return facts.base(entities=source["entities"], seed=source["seed"])
        case "concept1k":
            return concept1k.task(
                source["index"],
                Path(source["file"]),
                concepts_per_task=source["concepts_per_task"],
            )
        case "jsonl":
            return jsonl.task(
                source["name"],
                Path(source["train"]),
                Path(source["test"]) if source.get("test") else None,
                prompt_key=source["prompt_key"],
                answer_key=source["answer_key"],
            )
    raise ValueError(f"no task format {source['format']!r}")


def make_tokenizer(
    config: Mapping[str, Any], inputs: Mapping[str, Path], out_dir: Path, context: Context
) -> None:
    """The built-in model's tokenizer, trained on its generic facts."""
    rows = open_task(config["task"]).splits["train"]()
    models.builtin_tokenizer(row.prompt + row.answer for row in rows).save_pretrained(out_dir)


def prepare(
    config: Mapping[str, Any], inputs: Mapping[str, Path], out_dir: Path, context: Context
) -> None:
    """Write `<split>.arrow` for every split and `summary.json` with counts.

    Rows stream through Ray Data in order and are never whole in memory. Rows longer than
    `max_length` tokens are left out and counted.
    """
    tokenizer = models.load_tokenizer(inputs["tokenizer"])
    files = {role: str(path) for role, path in inputs.items() if role in FILE_KEYS}
    task = open_task({**config["task"], **files})
    summary: dict[str, dict[str, int]] = {}
    for split, source in task.splits.items():
        counts = {"rows": 0, "tokens": 0, "answer_tokens": 0, "left_out": 0}
        with (
            pa.OSFile(str(out_dir / f"{split}.arrow"), "wb") as sink,
            pa.ipc.new_file(sink, SCHEMA) as writer,
        ):
            for table in _encoded(source, tokenizer):
                writer.write_table(_drop_long(table, config["max_length"], counts))
                context.log({"rows": counts["rows"]}, counts["rows"])
        if not counts["rows"]:
            raise ValueError(
                f"task {task.name}: no {split} row has at most {config['max_length']} tokens "
                "(tasks.max_length)"
            )
        summary[split] = counts
    write_json(out_dir / SUMMARY, {"splits": summary, "scored": dict(task.scored)})


def _encoded(source: RowSource, tokenizer: PreTrainedTokenizerBase) -> Iterator[pa.Table]:
    import ray.data

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    dataset = ray.data.read_datasource(
        _source_of(partial(_blocks, source)), override_num_blocks=1
    ).map_batches(
        partial(_encode_block, tokenizer=tokenizer),
        batch_format="pyarrow",
        batch_size=_BLOCK_ROWS,
        num_cpus=0.5,
    )
    for table in dataset.iter_batches(batch_format="pyarrow", batch_size=_BLOCK_ROWS):
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


def _encode_block(table: pa.Table, tokenizer: PreTrainedTokenizerBase) -> pa.Table:
    texts = zip(table["prompt"].to_pylist(), table["answer"].to_pylist(), strict=True)
    return encode(tokenizer, [Row(prompt, answer) for prompt, answer in texts])


def _drop_long(table: pa.Table, max_length: int, counts: dict[str, int]) -> pa.Table:
    import pyarrow.compute as pc

    lengths = pc.list_value_length(table["input_ids"])
    kept = table.filter(pc.less_equal(lengths, max_length))
    tokens = pc.sum(pc.list_value_length(kept["input_ids"])).as_py() or 0
    counts["rows"] += kept.num_rows
    counts["tokens"] += tokens
    counts["answer_tokens"] += tokens - (pc.sum(kept["prompt_tokens"]).as_py() or 0)
    counts["left_out"] += table.num_rows - kept.num_rows
    return kept
