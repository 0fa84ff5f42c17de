"""From a config to the list of its stages, readable top to bottom."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.check import is_builtin
from pipeline.config.config import Config
from pipeline.config.sources import held_out_sources, sources
from pipeline.plan.nodes import (
    attribute_stage,
    base_model_stage,
    evaluate_stage,
    first_session,
    looking_at,
    prepare_stage,
    report_stage,
    solo_stages,
    tokenizer_stage,
    train_stage,
    training_settings,
)
from pipeline.plan.stage import External, ResolvedStage, Stage
from pipeline.stages.evaluate import evaluate
from pipeline.stages.train import train


@dataclass(frozen=True)
class Plan:
    """What a config asks for."""

    stages: tuple[Stage, ...]
    """In dependency order; the last one is the report."""
    tasks: tuple[str, ...]
    final_model: str
    """Name of the stage whose artifact is the final model."""


@dataclass(frozen=True)
class Run:
    """A config with its folder and its stages, resolved to artifacts."""

    config: Config
    folder: Path
    plan: Plan
    resolved: Mapping[str, ResolvedStage]
    """By stage name."""


def plan(config: Config) -> Plan:
    """The stages of one method over one sequence. Reads no data and runs nothing."""
    of_tasks, held_out = sources(config), held_out_sources(config)
    tasks = [source.name for source in of_tasks]
    tokenizer = tokenizer_stage(config)
    rows = {
        source.name: prepare_stage(config, source, tokenizer) for source in [*of_tasks, *held_out]
    }
    base = base_model_stage(config, tokenizer, rows)
    at_first = evaluate_stage(config, "0-base", base, rows, first_session(config))
    builtin = [tokenizer, base] if is_builtin(config) else []
    start = [*builtin[:1], *rows.values(), *builtin[1:], at_first]
    match config.method:
        case "joint":
            chain = _joint(config, tasks, base, rows)
        case "solo":
            chain = _alone(config, tasks, base, rows)
        case _:
            chain = _sequence(config, tasks, base, rows)
    scores = [at_first, *(stage for stage in chain if stage.fn is evaluate)]
    if config.method == "joint":
        # One model stands for the one after every task.
        scores = [at_first, *scores[1:] * len(tasks)]
    final = report_stage(config, tasks, [each.name for each in held_out], scores, chain)
    return Plan(
        stages=tuple(s for s in [*start, *chain, final] if isinstance(s, Stage)),
        tasks=tuple(tasks),
        final_model=[stage for stage in chain if stage.fn is train][-1].name,
    )


def _sequence(
    config: Config, tasks: list[str], base: Stage | External, rows: Mapping[str, Stage]
) -> list[Stage]:
    """Task after task, each from the model of the last one."""
    solos = solo_stages(config, tasks, base, rows)
    chain = list(solos.values())
    importances: dict[str, Stage] = {}
    models: list[Stage] = []
    for index, task in enumerate(tasks, start=1):
        model = train_stage(config, index, task, base, models, rows, importances)
        models.append(model)
        chain.append(model)
        if config.protect:
            measured = solos[task] if solos else model
            on_factors = config.adapter is not None and not config.adapter.fresh
            looked_at = looking_at(base, model) if on_factors else {"model": measured}
            inputs = {**looked_at, "rows": rows[task]}
            importances[task] = attribute_stage(config, index, task, measured.session, inputs)
            chain.append(importances[task])
        chain.append(evaluate_stage(config, f"{index}-{task}", model, rows, "sequence", base))
    return chain


def _joint(
    config: Config, tasks: list[str], base: Stage | External, rows: Mapping[str, Stage]
) -> list[Stage]:
    """All tasks at once."""
    first, *others = tasks
    model = Stage(
        name="train/joint",
        fn=train,
        config={**training_settings(config, len(tasks)), "replay": 1.0},
        inputs={
            "model": base,
            "rows": rows[first],
            **{f"replay/{task}": rows[task] for task in others},
        },
        session="sequence",
        train=True,
    )
    return [model, evaluate_stage(config, f"{len(tasks)}-joint", model, rows, "sequence")]


def _alone(
    config: Config, tasks: list[str], base: Stage | External, rows: Mapping[str, Stage]
) -> list[Stage]:
    """Every task from the base model."""
    chain = []
    for index, task in enumerate(tasks, start=1):
        model = train_stage(config, index, task, base, [], rows, {})
        chain += [model, evaluate_stage(config, f"{index}-{task}", model, rows, "sequence")]
    return chain
