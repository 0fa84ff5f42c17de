"""The final model's folder: what plain transformers loads, with a model card beside it."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pipeline.config.config import Config
from pipeline.config.presets import METHODS
from pipeline.plan.stage import ResolvedStage
from pipeline.results.results import RunResult, evaluation_sets
from pipeline.stages.files import ADAPTER
from pipeline.storage import artifact

MODEL, CARD, LOCATION = "model", "README.md", "location.txt"
"""The final model's folder in a run's, the card in it, and where a file or model lies instead."""
_OWN_FILES = {artifact.MANIFEST, "log.jsonl", "checks.json"}
_METRICS = {
    "average_performance": "Average performance",
    "backward_transfer": "Backward transfer",
    "learning_accuracy": "Learning accuracy",
}


def write_model_folder(
    folder: Path, model: ResolvedStage, config: Config, result: RunResult, mlflow_run: str | None
) -> None:
    """Make `folder` the final model: links to the files of the artifact `model`, and a card.

    With an object store also a text file with the URI of those files, which need not be here.
    Written aside and renamed; replaces an older one. `mlflow_run` is the run's id, if recorded.
    """
    aside = folder.with_name(folder.name + ".part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    there = model.folder.exists()
    files = [f for f in model.folder.iterdir() if f.name not in _OWN_FILES] if there else []
    if adapter_alone(model) and there:
        files += (model.folder / ADAPTER).iterdir()
    for file in files:
        (aside / file.name).symlink_to(os.path.relpath(file, folder))
    text = card(config, result, mlflow_run, adapter=adapter_alone(model))
    aside.joinpath(CARD).unlink(missing_ok=True)  # PEFT leaves an empty one.
    (aside / CARD).write_text(text, encoding="utf-8")
    if uri := model.storage.uri_of_files(model.folder):
        (aside / LOCATION).write_text(f"{uri}\n")
    if folder.is_symlink():
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def adapter_alone(model: ResolvedStage) -> bool:
    """Whether an artifact holds an adapter and not the model that it belongs on."""
    return "config.json" not in (model.manifest() or {"files": ()})["files"]


def card(
    config: Config, result: RunResult, mlflow_run: str | None, *, adapter: bool = False
) -> str:
    """The model card (Markdown behind a YAML head, as the Hugging Face hub reads it)."""
    metrics = result.metrics
    builtin = config.model.path == "builtin"
    base = "agcl's built-in tiny model" if builtin else _cell(Path(config.model.path).name)
    head = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["agcl", "continual-learning"],
    }
    lines = [
        "---",
        yaml.safe_dump(head, sort_keys=False).strip(),
        "---",
        "",
        f"# {config.name}",
        "",
        f"{base}, fine-tuned on {len(metrics['tasks'])} tasks "
        f"{'at once' if config.method == 'joint' else 'one after the other'} by agcl, method "
        f"`{config.method}` ({METHODS[config.method].description}), seed {config.seed}.",
        "",
        *_usage(adapter),
        "",
        "## Tasks",
        "",
        *_tasks(result),
        "",
        "## Metrics",
        "",
        "In [0, 1], on rows that no setting was chosen by; the main set is "
        f"{_cell(metrics['evaluation_set'])}.",
        "",
        *_table(
            ["Scored on", *_METRICS.values()],
            [
                [_cell(name), *(_number(values[key]) for key in _METRICS)]
                for name, values in evaluation_sets(metrics).items()
            ],
        ),
        "",
        "## Where it comes from",
        "",
        f"- MLflow run: {f'`{mlflow_run}`' if mlflow_run else 'not recorded'}",
        *(f"- {key}: {_cell(str(value))}" for key, value in result.provenance.items()),
        "",
        "<details><summary>Resolved config</summary>",
        "",
        *(f"    {line}" for line in result.config_yaml.splitlines()),
        "",
        "</details>",
    ]
    return "\n".join(lines) + "\n"


def _usage(adapter: bool) -> list[str]:
    library, name = (
        ("peft", "AutoPeftModelForCausalLM")
        if adapter
        else ("transformers", "AutoModelForCausalLM")
    )
    return [
        "```python",
        f"from {library} import {name}",
        "from transformers import AutoTokenizer",
        "",
        f'model = {name}.from_pretrained("FOLDER")',
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
        "```",
        "",
        "Prompts must look as those it was trained on (`agcl tasks CONFIG` shows them); decode",
        "greedily, up to the end-of-sequence token.",
    ]


def _tasks(result: RunResult) -> list[str]:
    """A line a task: its rows, its score right after it was trained and at the end."""
    metrics: Mapping[str, Any] = result.metrics
    matrix = metrics["accuracy_matrix"]
    rows = []
    for index, task in enumerate(metrics["tasks"]):
        counts = result.rows.get(task, {}).get("train", {})
        scores = (matrix[0][index], matrix[index + 1][index], matrix[-1][index])
        scorer, count = metrics.get("scorers", {}).get(task, ""), counts.get("rows", "")
        rows.append([_cell(task), _cell(scorer), str(count), *map(_number, scores)])
    head = ["Task", "Scored by", "Training rows", "Before", "Right after", "At the end"]
    return _table(head, rows)


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def _cell(text: str) -> str:
    """Text of a user's that must not be read as Markdown."""
    kept = " ".join(text.split()).replace("`", "'").replace("|", "/")
    return f"`{kept}`" if kept else ""


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
