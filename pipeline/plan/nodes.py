"""The stages of a plan, one function per kind: the settings and inputs each depends on.

All stages of one kind have the same config keys, with None where a setting does not apply. Train
stages: `training.py`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.config.config import Config
from pipeline.config.method import Project
from pipeline.config.naming import method_name
from pipeline.config.row_lengths import max_length
from pipeline.config.scorer_files import source_files
from pipeline.config.sources import BASE_TASK, held_out_sources, selection
from pipeline.config.task_section import Source
from pipeline.config.weights import attributed_dtype, loaded_dtype
from pipeline.plan.stage import External, Stage
from pipeline.stages.attribute import attribute
from pipeline.stages.evaluate import evaluate
from pipeline.stages.files import BASE_KNOWLEDGE, CHECKS, IMPORTANCE_FILE, PREDICTIONS
from pipeline.stages.metrics import report
from pipeline.stages.prepare import FILES, make_tokenizer, prepare
from pipeline.stages.train import pretrain, train

_TOKENIZER_FILES = (
    "config.json",  # By its model_type transformers chooses the tokenizer's class.
    *("token*", "special_tokens*", "added_tokens*", "vocab*", "merges*", "*.jinja"),
)
_MODEL_FILES = ("generation_config.json", "*.safetensors*", *_TOKENIZER_FILES)

Inputs = dict[str, Stage | External]
"""By role."""


def adapter_on(base: Stage | External, adapter: Stage) -> Inputs:
    """Inputs of a stage that loads an adapter onto its base model."""
    return {"model": base, "adapter": adapter}


def first_session(config: Config) -> str:
    """The session that trains the base model; a separate one if solo models start from it too."""
    return "base" if config.model.is_builtin and config.measures_solos else "sequence"


def loading(config: Config, dtype: str | None = None) -> dict[str, Any]:
    """The config key of stages that load the model: keywords of `load_model`.

    `dtype` is one other than the config's.
    """
    chosen = config.model.model_dump(include={"attention", "quantization"})
    return {"loading": {"dtype": dtype or loaded_dtype(config.model), **chosen}}


def tokenizer_stage(config: Config) -> Stage | External:
    """The stage that trains the built-in model's tokenizer, or the given model's files."""
    if not config.model.is_builtin:
        return External(config.model.folder, _TOKENIZER_FILES, config.model.identity)
    return Stage(
        name="tokenizer",
        fn=make_tokenizer,
        config={"task": held_out_sources(config)[0].settings},
        session="prepare",
    )


def prepare_stage(config: Config, source: Source, tokenizer: Stage | External) -> Stage:
    """A task's rows, tokenized. They are the same with any scorer."""
    files = {FILES + role: External(path, ("**/*",)) for role, path in source.files.items()}
    return Stage(
        name=f"prepare/{source.name}",
        fn=prepare,
        config={
            "task": {key: of for key, of in source.settings.items() if key != "scorer"},
            "selection": selection(config, source),
            "max_length": max_length(config),
            "truncate": config.tasks.truncate,
            "chat_template": config.tasks.chat_template,
        },
        inputs={"tokenizer": tokenizer, **files},
        session="prepare",
    )


def base_model_stage(
    config: Config, tokenizer: Stage | External, rows: Mapping[str, Stage]
) -> Stage | External:
    """The stage that pretrains the built-in model, or the given model's files."""
    if not config.model.is_builtin:
        return External(config.model.folder, _MODEL_FILES, config.model.identity)
    settings = config.model.pretraining
    return Stage(
        name="pretrain",
        fn=pretrain,
        config={
            **config.training.model_dump(),
            "optimizer": "adamw",
            "momentum": None,
            "rounding": None,
            "learning_rate": settings.learning_rate,
            "schedule": "constant",
            "warmup": 0.0,
            "epochs": settings.epochs,
            "batch_size": settings.batch_size,
            "micro_batch_size": None,
            "seed": config.seed,
        },
        inputs={"tokenizer": tokenizer, "rows": rows[BASE_TASK]},
        session=first_session(config),
        train=True,
    )


def attribute_stage(
    config: Config,
    index: int,
    task: str,
    session: str,
    inputs: Mapping[str, Stage | External],
    *,
    correct_only: bool,
) -> Stage:
    """The importance of task `index` for the model in `inputs`."""
    projection = next((p for p in config.measured if isinstance(p, Project)), None)
    return Stage(
        name=f"attribute/{index}-{task}",
        fn=attribute,
        config={
            **config.importance.model_dump(exclude={"source", "past"}),
            "correct_only": correct_only,
            "entries": config.measures_entries,
            "moments": projection and projection.weighting,
            "unit_inputs": projection is None or projection.unit_inputs,
            "seed": config.seed * 1000 + index,
            **loading(config, attributed_dtype(config.model, config.importance)),
        },
        inputs=inputs,
        session=session,
        train=True,
    )


def evaluate_stage(
    config: Config,
    name: str,
    model: Stage | External,
    rows: Mapping[str, Stage],
    scorers: Mapping[str, str],
    session: str,
    base: Stage | External | None = None,
    new: Sequence[str] = (),
    *,
    last: bool = False,
) -> Stage:
    """Score `model`, which is only an adapter on its `base` if adapters are not merged.

    `rows` and `scorers` are by task. Also compares it with its `base`, including on the answers of
    the `new` tasks, which it was just trained on; omit both for the base model itself. The `last`
    stage of a run also checks the saved files. A search's trials skip the comparison and the check.
    """
    settings = config.evaluation
    in_trial = settings.rows == "validation"
    unmerged = config.adapter is not None and not config.adapter.merge
    inputs: Inputs = {"model": model}
    if unmerged and base and isinstance(model, Stage):
        inputs = adapter_on(base, model)
    inputs |= {f"rows/{task}": stage for task, stage in rows.items()}
    if base and not in_trial:
        inputs["base"] = base
    if not in_trial:
        inputs |= {f"probe/{file.stem}": External(file) for file in settings.probes}
    if settings.text:
        inputs["text"] = External(settings.text)
    for scorer in sorted({s for s in (*scorers.values(), *settings.scorers) if ":" in s}):
        inputs |= {f"code/{name}": External(file) for name, file in source_files(scorer).items()}
    return Stage(
        name=f"evaluate/{name}",
        fn=evaluate,
        config={
            **settings.model_dump(mode="json", exclude={"rows", "set", "text", "probes"}),
            # Pairs, since MLflow allows fewer characters in a param's name than a task has.
            "task_scorers": sorted(scorers.items()),
            "validation": settings.validation if in_trial else None,
            "saved": last and not in_trial,
            "new": list(new),
            "facts": BASE_TASK if config.model.is_builtin else None,
            **loading(config),
        },
        inputs=inputs,
        session=session,
        train=True,
    )


def report_stage(
    config: Config,
    tasks: list[str],
    scores: list[Stage],
    chain: list[Stage],
) -> Stage:
    """The metrics, from the scores, importances and checks of all tasks."""
    measured = {s.name.partition("-")[2]: s for s in chain if s.fn is attribute}
    return Stage(
        name="report",
        fn=report,
        config={
            "method": method_name(config),
            "seed": config.seed,
            "tasks": tasks,
            "facts": BASE_TASK if config.model.is_builtin else None,
            "evaluation_set": config.evaluation.set,
            "validation": config.evaluation.validation,
            "only_validation": config.evaluation.rows == "validation",
        },
        inputs={
            **{f"scores/{i}": stage for i, stage in enumerate(scores)},
            **{f"importance/{task}": stage for task, stage in measured.items()},
            **{f"model/{s.name}": s for s in chain if s.fn is train},
        },
        session="sequence",  # Alone in its session it still needs no Ray Train workers.
        reads=(PREDICTIONS, BASE_KNOWLEDGE, IMPORTANCE_FILE, CHECKS),
    )
