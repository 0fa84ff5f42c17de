"""The final model's folder, which plain transformers loads, and the model card in it."""

import os
import shutil
from contextlib import suppress
from pathlib import Path

import torch
from agcl.model import models

from pipeline.config import hub
from pipeline.config.config import Config
from pipeline.config.naming import method_description, method_name
from pipeline.config.weights import loaded_dtype, stored_dtype
from pipeline.plan.plan import Run
from pipeline.plan.stage import ResolvedStage
from pipeline.results.files import CARD, LOCATION, MODEL
from pipeline.results.results import METRIC_TITLES, RunResult, base_measures, base_title
from pipeline.results.run_folder import summaries
from pipeline.results.templates import render
from pipeline.stages.files import ADAPTER, CHECKS, LOG_FILE
from pipeline.storage import artifact

_OWN_FILES = {artifact.MANIFEST, LOG_FILE, CHECKS}
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""That vLLM takes as the maximum rank of adapters."""
_METRICS = ("average_performance", "backward_transfer", "learning_accuracy")


def write_model_folder(run: Run, result: RunResult, mlflow_run: str | None) -> None:
    """Give the run's folder its final model, from the files of the artifact, and a card.

    The weights have the dtype of the base model's: they are hard links if they were trained in
    it, and copies where the file system has no hard links. With a bucket they are symbolic links
    into its cache, in the dtype they were trained in, beside a text file with the model's URI.
    Replaces an earlier folder; a new one is complete before it gets its name.
    """
    folder, model = run.folder / MODEL, run.resolved[run.plan.final_model]
    if run.config.tracking.register_model:
        model.fetch()
    uri = model.storage.uri_of_files(model.folder)
    aside = folder.with_name(folder.name + ".part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    dtype = stored_dtype(run.config.model)
    there = model.folder.exists()
    files = [f for f in model.folder.iterdir() if f.is_file()] if there else []
    trained = loaded_dtype(run.config.model)
    change = dtype if str(dtype) != f"torch.{trained}" else None
    if adapter_alone(model) and there:
        files += (model.folder / ADAPTER).iterdir()
    for file in files:
        if file.name in _OWN_FILES:
            continue
        if uri:
            (aside / file.name).symlink_to(os.path.relpath(file, folder))
        else:
            _place(file, aside / file.name, change)
    if uri:  # Links into the artifact, whose files stay as they were trained.
        dtype = getattr(torch, trained)
    text = card(
        run.config,
        result,
        mlflow_run,
        chat=any(summary.get("conversations") for summary in summaries(run).values()),
        adapter=adapter_alone(model),
        dtype=dtype,
        trained=trained,
    )
    aside.joinpath(CARD).unlink(missing_ok=True)  # PEFT leaves an empty card.
    (aside / CARD).write_text(text, encoding="utf-8")
    if uri:
        (aside / LOCATION).write_text(f"{uri}\n")
    if folder.is_symlink():
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def _place(file: Path, target: Path, dtype: torch.dtype | None) -> None:
    """Put a file of the final model's artifact into the run's folder, changed to a `dtype`."""
    is_weights = file.match("model*.safetensors")
    if dtype is not None and (is_weights or file.name == "config.json"):
        models.save_in(dtype, file, target)
        target.chmod(file.stat().st_mode)
        return
    # Weights alone are linked: small files may be edited in place, which would damage the artifact.
    if is_weights:
        with suppress(OSError):
            target.hardlink_to(file)
            return
    shutil.copyfile(file, target)


def adapter_alone(model: ResolvedStage) -> bool:
    """Whether an artifact holds an adapter without its base model."""
    return "config.json" not in (model.manifest() or {"files": ()})["files"]


def card(
    config: Config,
    result: RunResult,
    mlflow_run: str | None,
    *,
    chat: bool = False,
    adapter: bool = False,
    dtype: torch.dtype = torch.float32,
    trained: str = "float32",
) -> str:
    """Render the model card: Markdown with the YAML header that the Hugging Face Hub reads.

    `chat`: whether the model was trained on rows that its chat template rendered.
    """
    return render(
        "model_card.md.j2",
        escape=False,  # The card is not HTML: the filter `code` protects it instead.
        config=config,
        base=None if config.model.is_builtin else Path(config.model.path).name,
        on_hub=config.model.path if config.model.on_hub else None,
        commit=hub.parts(config.model.revision)[1],
        method=method_name(config),
        description=method_description(config),
        adapter=adapter,
        lora_rank=config.adapter and next(r for r in _RANKS if r >= min(config.adapter.rank, 512)),
        dtype=str(dtype).removeprefix("torch."),
        trained=trained,
        chat=chat,
        run=result,
        base_measures={base_title(key): of for key, of in base_measures(result).items()},
        metric_titles={key: METRIC_TITLES[key] for key in _METRICS},
        mlflow_run=mlflow_run,
    )
