"""How much of the base model's knowledge a model still has, measured with its task scores."""

import gc
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from agcl.errors import InputError
from agcl.scoring import probes
from agcl.scoring.evaluate import answer_kl, text_loss, text_loss_and_kl
from agcl.tasks import Encoded, EncodedRows, sample
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.stages.context import Context
from pipeline.stages.files import BASE_KNOWLEDGE, PROBES, SUMMARY, named, rows_file
from pipeline.storage.artifact import write_json

_CHARACTERS = 64
"""Read per token that is asked for: more than tokens of common languages have."""


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: Mapping[str, Any],
    inputs: Mapping[str, Path],
    out_dir: Path,
    context: Context,
) -> None:
    """Write `base.json`, with keys only for what is measured.

    `text_loss` on the input `text`, `kl` from the input `base` on the same tokens, and `kl_answers`
    on the answers of the config's `new` tasks, all in nats per token. The two divergences are 0 for
    the base model itself, which has no input `base`; a search's trials do not measure them.
    `probes` holds the accuracies on every input `probe/<name>`.
    """
    # First, while memory holds no second model.
    of_probes = probe_scores(model, tokenizer, inputs, config, out_dir, context)
    options: dict[str, Any] = {"precision": config["precision"]}
    found: dict[str, Any] = {}
    base = None
    if "base" in inputs:
        # An unmerged adapter is on the base model itself, and switched off for the comparison.
        same = inputs["base"] == inputs["model"]
        base = model if same else context.loaded(inputs["base"], config)
        found["kl_answers"] = answer_kl(model, base, _answers(config["new"], inputs), **options)
    elif config["validation"] is None:
        found["kl_answers"] = 0.0
    if "text" in inputs:
        ids = _text_ids(tokenizer, inputs["text"], config["text_tokens"])
        # Models whose tokenizer starts every text with BOS may know no text without it.
        start = tokenizer.bos_token_id
        options["start"] = start if tokenizer("")["input_ids"][:1] == [start] else None
        if base is not None:
            found["text_loss"], found["kl"] = text_loss_and_kl(model, base, ids, **options)
        else:
            found["text_loss"] = text_loss(model, ids, **options)
            found |= {"kl": 0.0} if "kl_answers" in found else {}
    if context.shard_model:
        base = None
        gc.collect()  # Cycles would keep a sharded base in memory while the next task is trained.
    if found:
        context.log(found, len(named("rows/", inputs)) + 1)
    if of_probes:
        found["probes"] = of_probes
    if context.is_rank_zero:
        write_json(out_dir / BASE_KNOWLEDGE, found)


def _text_ids(tokenizer: PreTrainedTokenizerBase, file: Path, most: int) -> list[int]:
    with file.open(encoding="utf-8-sig") as text:
        beginning = text.read(most * _CHARACTERS)
    ids: list[int] = tokenizer(beginning, add_special_tokens=False)["input_ids"]
    return ids[:most]


def probe_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Mapping[str, Path],
    config: Mapping[str, Any],
    out_dir: Path,
    context: Context,
) -> dict[str, dict[str, float]]:
    """`acc` and `acc_norm` by probe; writes `probes.parquet` with a line per question."""
    asked = {}
    for name, file in named("probe/", inputs).items():
        questions = probes.read(file)
        chosen = sample(len(questions), config["probe_rows"] or len(questions), seed=0)
        asked[name] = {i: questions[i] for i in chosen}
    # Behind the steps of the tasks' scores, from which `agcl plan` takes the time per row.
    step = len(named("rows/", inputs)) + 1
    end = step + sum(map(len, asked.values()))

    def log(before: int, done: int) -> None:
        context.log({"of_steps": end}, before + done)

    found: dict[str, dict[str, float]] = {}
    lines: list[dict[str, Any]] = []
    for name, by_number in asked.items():
        try:
            scored = probes.score(
                model,
                tokenizer,
                list(by_number.values()),
                batch_size=config["batch_size"],
                precision=config["precision"],
                log=partial(log, step),
            )
        except InputError as error:
            raise InputError(f"evaluation.probes: {name}: {error}") from None
        of_probe = [
            {
                "probe": name,
                "question": number,
                "answer": question.answer,
                "acc": each.by_sum,
                "acc_norm": each.by_length,
            }
            for (number, question), each in zip(by_number.items(), scored, strict=True)
        ]
        found[name] = {
            key: fmean(line[key] == line["answer"] for line in of_probe)
            for key in ("acc", "acc_norm")
        }
        lines += of_probe
        step += len(by_number)
        context.log({f"probes/{name}": found[name]["acc_norm"], "of_steps": end}, step)
    if found and context.is_rank_zero:
        pq.write_table(pa.Table.from_pylist(lines), out_dir / PROBES)
    return found


def _answers(tasks: list[str], inputs: Mapping[str, Path]) -> list[Encoded]:
    """The rows of each task's first evaluation set."""
    rows: list[Encoded] = []
    for task in tasks:
        folder = inputs[f"rows/{task}"]
        scored = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))["scored"]
        of_task = EncodedRows(folder / rows_file(next(iter(scored.values()))))
        rows += [of_task[i] for i in range(len(of_task))]
    return rows
