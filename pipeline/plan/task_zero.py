"""Task 0: the stages that measure what the base model relied on before the first task."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

from pipeline.config.config import Config
from pipeline.config.row_lengths import base_tokens
from pipeline.config.sources import BASE_TASK, base_rows, sources
from pipeline.plan.nodes import (
    Inputs,
    attribute_stage,
    first_session,
    loading,
    prepare_stage,
)
from pipeline.plan.stage import External, Stage
from pipeline.stages.base_text import cut_text, write_own_text
from pipeline.stages.corda import decompose


def base_importance_stages(
    config: Config, tokenizer: Stage | External, base: Stage | External, rows: Mapping[str, Stage]
) -> list[Stage]:
    """Stages that make the rows to measure the base model on, then the stage that measures it.

    Empty if the base model is not measured. With CorDA, the last stage makes the initial adapter.
    """
    settings = config.base
    texts = {"samples": settings.samples, "tokens": base_tokens(config), "seed": settings.seed}
    match settings.protect if config.measures_base else "none":
        case "none":
            return []
        case "self":
            stage = Stage(
                name="own_text",
                fn=write_own_text,
                config={**texts, "precision": config.evaluation.precision, **loading(config)},
                inputs={"model": base},
                session=first_session(config),
                train=True,
            )
            measured_on = [stage]
        case "text":
            inputs = {
                "tokenizer": tokenizer,
                "text": External(cast(Path, settings.text), ("**/*",)),
            }
            measured_on = [Stage("base_text", cut_text, texts, inputs, session="prepare")]
        case "rows" if given := base_rows(config):
            measured_on = [
                replace(prepare_stage(given, each, tokenizer), name=f"prepare/base/{each.name}")
                for each in sources(given)
            ]
        case _:
            measured_on = [rows[BASE_TASK]]
    inputs = {f"rows/{number}": stage for number, stage in enumerate(measured_on)}
    if config.starts_from_corda:
        return [*measured_on, _corda_stage(config, {"model": base, **inputs})]
    measured = attribute_stage(
        config, 0, "base", first_session(config), {"model": base, **inputs}, correct_only=False
    )
    of_base = {
        **measured.config,
        "seed": settings.seed,
        "samples": settings.samples,
        "moments": measured.config["moments"] and settings.weighting,
    }
    return [*measured_on, replace(measured, config=of_base)]


def _corda_stage(config: Config, inputs: Inputs) -> Stage:
    """The stage that computes the initial CorDA adapter."""
    assert config.adapter
    return Stage(
        name="corda",
        fn=decompose,
        config={
            **config.adapter.model_dump(include={"rank", "alpha"}),
            **config.base.model_dump(include={"samples", "seed"}),
            **loading(config),
        },
        inputs=inputs,
        session=first_session(config),
        train=True,
    )
