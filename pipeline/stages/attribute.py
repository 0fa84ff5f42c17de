"""Attribute: which weights carried the right answers of a task."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agcl.attribution import attribute as attribute_batches
from agcl.attribution.attribute import Split
from agcl.importance import magnitude, permuted, random
from agcl.lrp import attributed_linears
from agcl.model import adapter
from agcl.parallel import distributed
from agcl.scoring.scorers import RIGHT_OR_WRONG
from agcl.tasks import TRAIN, EncodedRows, sample
from agcl.tasks.batches import collate, in_order

from pipeline.stages.context import Context
from pipeline.stages.files import ADAPTER, IMPORTANCE_FILE, SUMMARY, rows_file


def attribute(
    config: Mapping[str, Any], inputs: Mapping[str, Path], out_dir: Path, context: Context
) -> None:
    """Write `importance.safetensors` for `model` on the training rows of `rows`.

    With an `adapter` on the model it is that of the adapter's factors.
    """
    model = context.take_model(inputs["model"])
    peft_model = adapter.load(model, inputs["adapter"] / ADAPTER) if "adapter" in inputs else None
    if peft_model is not None:
        model = peft_model.get_base_model()
    rows = EncodedRows(inputs["rows"] / rows_file(TRAIN))
    chosen = sample(len(rows), config["samples"] or len(rows), seed=config["seed"])
    summary = json.loads((inputs["rows"] / SUMMARY).read_text(encoding="utf-8"))
    batches = in_order(len(chosen), config["batch_size"])
    split: Split = "layers" if context.shard_model else config["split"]
    mine = batches if split == "layers" else batches[distributed.rank() :: distributed.world_size()]
    estimator = config["estimator"]
    importance = attribute_batches(
        model,
        (collate([rows[chosen[i]] for i in indices]) for indices in mine),
        # Without an estimate of its own, for the input moments alone.
        estimator="das" if estimator in ("magnitude", "random") else estimator,
        top_k=config["top_k"],
        rules=config["rules"],
        moments=config["moments"],
        unit_inputs=config["unit_inputs"],
        entries=config.get("entries", True),
        # Of a long answer that is scored in part, hardly any is right to the letter.
        correct_only=config["correct_only"] and summary["scorer"] in RIGHT_OR_WRONG,
        split=split,
        running_values=config["running_values"],
        log=lambda done: context.log({"rows": done, "of_rows": len(chosen)}, done),
    )
    if estimator == "magnitude":
        importance = magnitude(importance, attributed_linears(model))
    if estimator == "random":
        importance = random(importance, seed=config["seed"])
    if config["permuted"]:
        importance = permuted(importance, seed=config["seed"])
    importance.check_finite()
    if importance.is_zero():
        raise ValueError("every importance is zero: no relevance reached any weight")
    if context.is_first_worker:
        importance.save(out_dir / IMPORTANCE_FILE)
    context.hold_model(adapter.removed(peft_model) if peft_model else model, inputs["model"])
