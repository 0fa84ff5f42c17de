"""From a config to its stages, in dependency order."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from agcl.scoring.scorers import RIGHT_OR_WRONG

from pipeline.config.config import Config
from pipeline.config.sources import held_out_sources, open_task, sources
from pipeline.plan.nodes import (
    adapter_on,
    attribute_stage,
    base_model_stage,
    evaluate_stage,
    first_session,
    prepare_stage,
    report_stage,
    tokenizer_stage,
)
from pipeline.plan.stage import External, ResolvedStage, Stage
from pipeline.plan.task_zero import base_importance_stages
from pipeline.plan.training import merge_stage, past_files, solo_stages, train_stage
from pipeline.stages.evaluate import evaluate
from pipeline.stages.merge import merge
from pipeline.stages.train import train


@dataclass(frozen=True)
class Plan:
    """The stages of one config."""

    stages: tuple[Stage, ...]
    """In dependency order; the last one is the report."""
    tasks: tuple[str, ...]
    scorers: Mapping[str, str]
    """How answers are scored, by task."""
    final_model: str
    """Name of the stage whose artifact is the final model."""


@dataclass(frozen=True)
class Run:
    """A config with its result folder, and its stages resolved to artifacts."""

    config: Config
    folder: Path
    plan: Plan
    resolved: Mapping[str, ResolvedStage]
    """By stage name."""


def plan(config: Config) -> Plan:
    """The stages of one method on one sequence of tasks. Reads no data and runs nothing."""
    sequence, held_out = sources(config), held_out_sources(config)
    tasks = [source.name for source in sequence]
    tokenizer = tokenizer_stage(config)
    rows = {s.name: prepare_stage(config, s, tokenizer) for s in [*sequence, *held_out]}
    scorers = {s.name: open_task(s.settings, s.files).scorer for s in [*sequence, *held_out]}
    base = base_model_stage(config, tokenizer, rows)
    before = evaluate_stage(config, "0-base", base, rows, scorers, first_session(config))
    builtin = [tokenizer, base] if config.model.is_builtin else []
    of_base = base_importance_stages(config, tokenizer, base, rows)
    start = [*builtin[:1], *rows.values(), *builtin[1:], before, *of_base]
    protected = of_base[-1] if of_base else None
    match config.method:
        case "joint":
            chain = _joint(config, tasks, base, rows, scorers, protected)
        case "solo":
            chain = _alone(config, tasks, base, rows, scorers)
        case _:
            chain = _sequence(config, tasks, base, rows, scorers, protected)
    scores = [before, *(stage for stage in chain if stage.fn is evaluate)]
    if config.method == "joint":
        # The one model fills every row of the matrix after the first.
        scores = [before, *scores[1:] * len(tasks)]
    final = report_stage(config, tasks, scores, chain)
    return Plan(
        stages=tuple(s for s in [*start, *chain, final] if isinstance(s, Stage)),
        tasks=tuple(tasks),
        scorers={task: scorers[task] for task in tasks},
        final_model=[stage for stage in chain if stage.fn in (train, merge)][-1].name,
    )


def _sequence(
    config: Config,
    tasks: list[str],
    base: Stage | External,
    rows: Mapping[str, Stage],
    scorers: Mapping[str, str],
    of_base: Stage | None,
) -> list[Stage]:
    """One task after the other, each from the previous task's model."""
    solos = solo_stages(config, tasks, base, rows)
    chain = list(solos.values())
    importances: dict[str, Stage] = {}
    models: list[Stage] = []
    trained: list[Stage] = []
    for index, task in enumerate(tasks, start=1):
        model = train_stage(config, index, task, base, models, rows, importances, of_base, trained)
        trained.append(model)
        chain.append(model)
        result = model
        if config.merge:
            onto = models[-1] if models and config.merge.onto == "previous" else base
            result = merge_stage(config, index, task, model, onto)
            chain.append(result)
        # Merged with the base model, a result is only scored.
        models.append(model if config.merge and config.merge.onto == "base" else result)
        if config.measured:
            measured = solos[task] if solos else models[-1]
            on_factors = config.adapter is not None and not config.adapter.fresh
            inputs = adapter_on(base, model) if on_factors else {"model": measured}
            inputs["rows"] = rows[task]
            if config.sums_moments:
                earlier = list(importances.values())[-1:]
                inputs |= {"past": earlier[0]} if earlier else past_files(config, "past/")
            importances[task] = attribute_stage(
                config,
                index,
                task,
                measured.session,
                inputs,
                # A long answer is scored by similarity; hardly any is exactly right.
                correct_only=config.importance.correct_only and scorers[task] in RIGHT_OR_WRONG,
            )
            chain.append(importances[task])
        last = index == len(tasks)
        name = f"{index}-{task}"
        scored = evaluate_stage(
            config, name, result, rows, scorers, "sequence", base, [task], last=last
        )
        chain.append(scored)
    return chain


def _joint(
    config: Config,
    tasks: list[str],
    base: Stage | External,
    rows: Mapping[str, Stage],
    scorers: Mapping[str, str],
    of_base: Stage | None,
) -> list[Stage]:
    """One model trained on all tasks together."""
    first, *others = tasks
    model = train_stage(config, len(tasks), first, base, [], rows, {}, of_base)
    others_rows = {f"replay/{task}": rows[task] for task in others}
    model = replace(
        model,
        name="train/joint",
        # `order` is for the fingerprint, which sorts inputs by role: row order changes the result.
        config={**model.config, "replay": 1.0, "order": tasks},
        inputs={**model.inputs, **others_rows},
    )
    name = f"{len(tasks)}-joint"
    scored = evaluate_stage(config, name, model, rows, scorers, "sequence", base, tasks, last=True)
    return [model, scored]


def _alone(
    config: Config,
    tasks: list[str],
    base: Stage | External,
    rows: Mapping[str, Stage],
    scorers: Mapping[str, str],
) -> list[Stage]:
    """One model per task, each trained from the base model."""
    chain = []
    for index, task in enumerate(tasks, start=1):
        model = train_stage(config, index, task, base, [], rows, {})
        name, last = f"{index}-{task}", index == len(tasks)
        scored = evaluate_stage(
            config, name, model, rows, scorers, "sequence", base, [task], last=last
        )
        chain += [model, scored]
    return chain
