"""Train one task, starting from the previous task's model."""

import gc
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from agcl.model import models, subspace
from agcl.model.builtin import builtin_model
from agcl.parallel import distributed
from agcl.tasks import TRAIN, EncodedRows, Rows, sample
from agcl.tasks.batches import micro_batches, shuffled
from torch.utils.data import ConcatDataset, Subset
from transformers import PreTrainedModel

from pipeline.stages.context import Context
from pipeline.stages.files import named, rows_file
from pipeline.stages.fit import fit, freeze, write_checks
from pipeline.stages.loss import loss_of
from pipeline.stages.protection import (
    Protection,
    base_importance,
    past_importances,
    protect,
    warn_of_missing,
)
from pipeline.stages.train_adapter import train_adapter


def pretrain(
    config: Mapping[str, Any], inputs: Mapping[str, Path], out_dir: Path, context: Context
) -> None:
    """Train the built-in model from scratch on its generic facts."""
    tokenizer = models.load_tokenizer(inputs["tokenizer"])
    model = context.placed(builtin_model(len(tokenizer), seed=config["seed"]))
    fit(model, config, EncodedRows(inputs["rows"] / rows_file(TRAIN)), context, Protection())
    models.save(model, tokenizer, out_dir)
    context.hold_model(model, context.folder)


def train(
    config: Mapping[str, Any], inputs: Mapping[str, Path], out_dir: Path, context: Context
) -> None:
    """Train `model` on `rows` and write it.

    The inputs `importance/...`, `past` and `base_importance` say what to protect. Rows of the
    inputs `replay/...` are mixed in. `reference` is the model that the config's `loss` compares
    with. With `adapter` in the config, train LoRA factors instead of the weights. With `subspace`,
    freeze that leading share of each weight's singular directions and train factors of the rest.
    """
    rows = rows_of(config, inputs)
    _warn_of_idle_workers(config, rows, context)
    if config["adapter"]:
        train_adapter(config, inputs, out_dir, context, rows)
        return
    model = context.take_model(inputs["model"], config)
    if config["subspace"]:
        peft_model = subspace.attach(model, preserved=config["subspace"])
        inner = peft_model.get_base_model()
        freeze(inner, Protection(), config["freeze"])
        fit(inner, config, rows, context, Protection(), loss_of(config, inputs, context))
        model = subspace.merged(peft_model)
        del peft_model, inner
        gc.collect()  # PEFT's hooks keep the factors alive in cycles.
        _finish(model, inputs["model"], out_dir, context, rows)
        return
    past, base = past_importances(inputs, context.device), base_importance(inputs, context.device)
    if context.is_rank_zero:
        warn_of_missing(config, past, base, context.warn)
    protection = protect(model, past, config, base)
    freeze(model, protection, config["freeze"])
    fit(model, config, rows, context, protection, loss_of(config, inputs, context))
    write_checks(model, protection, config, len(rows), out_dir)
    _finish(model.requires_grad_(True), inputs["model"], out_dir, context, rows)


def _finish(
    model: PreTrainedModel, base: Path, out_dir: Path, context: Context, rows: Rows
) -> None:
    """Write the model with the tokenizer of `base`, and hold it for the next stage."""
    end = rows[0].input_ids[-1]
    models.save(model, models.load_tokenizer(base), out_dir, end=end)
    context.hold_model(model, context.folder)


def _warn_of_idle_workers(config: Mapping[str, Any], rows: Rows, context: Context) -> None:
    workers = distributed.world_size()
    if workers == 1 or not context.is_rank_zero:
        return
    if line := idle_workers(config, passes_per_batch(config, rows), workers):
        context.warn(line)


def idle_workers(config: Mapping[str, Any], passes: int, workers: int) -> str | None:
    """What to change if a batch of a train stage has fewer passes than there are workers."""
    if passes >= workers:
        return None
    return (
        f"a batch has only {passes} micro-batches for {workers} workers, so some workers "
        "are idle; to give each one a part, set training.micro_batch_size="
        f"{math.ceil(config['batch_size'] / workers)}"
    )


def passes_per_batch(config: Mapping[str, Any], rows: Rows) -> int:
    """Micro-batches of the first batch."""
    first = next(shuffled(len(rows), config["batch_size"], seed=config["seed"], epoch=0))
    lengths = [len(rows[i].input_ids) for i in first]
    return len(
        micro_batches(
            lengths,
            max_rows=config["micro_batch_size"],
            max_tokens=config["max_tokens"],
            packing=config["packing"],
        )
    )


def rows_of(config: Mapping[str, Any], inputs: Mapping[str, Path]) -> Rows:
    """The task's rows, plus the share `replay` of each earlier task's rows, at least one each."""
    own = EncodedRows(inputs["rows"] / rows_file(TRAIN))
    parts: list[Any] = [own]
    for number, folder in enumerate(named("replay/", inputs).values()):
        earlier = EncodedRows(folder / rows_file(TRAIN))
        count = max(1, round(config["replay"] * len(earlier)))
        chosen = sample(len(earlier), count, seed=config["seed"] * 1000 + number)
        parts.append(Subset(cast(Any, earlier), chosen))
    return ConcatDataset(parts)
