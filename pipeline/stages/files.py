"""Names of the files that stages write and other stages, results and tracking read."""

from collections.abc import Mapping
from pathlib import Path

LOG_FILE = "log.jsonl"
"""Every stage: its metrics by step, one JSON object per line."""
SUMMARY = "summary.json"
"""prepare: row and token counts per split, evaluation sets."""
TEXTS = "texts.jsonl"
"""write_own_text, cut_text: the texts to read, one JSON object per line."""
ADAPTER = "adapter"
"""train: folder of the LoRA adapter."""
CHECKS = "checks.json"
"""train: whether the protection held. report: the same for all tasks."""
IMPORTANCE_FILE = "importance.safetensors"
"""attribute."""
PAST_FILE = "past.safetensors"
"""attribute, from the second task on: the moments of all tasks so far, summed."""
SCORES = "scores.json"
"""evaluate: mean score per task and evaluation set."""
PREDICTIONS = "predictions.parquet"
"""evaluate: one line per scored row and scorer."""
SAVED = "saved.json"
"""evaluate, last one: number of rows that the saved model answered, and how many as scored."""
PROBES = "probes.parquet"
"""evaluate: one line per question of `evaluation.probes`, with the choices of both scores."""
BASE_KNOWLEDGE = "base.json"
"""evaluate: how much of the base model's knowledge is left: text loss, KL divergences, probes."""
METRICS = "metrics.json"
"""report."""
IMPORTANCE_SUMMARY = "importance.json"
"""report: importance by layer, and its overlap between tasks."""


def named(prefix: str, inputs: Mapping[str, Path]) -> dict[str, Path]:
    """The inputs of a stage whose role starts with `prefix`, by the rest of the role."""
    return {r.removeprefix(prefix): path for r, path in inputs.items() if r.startswith(prefix)}


def rows_file(split: str) -> str:
    """prepare: the tokenized rows of one split."""
    return f"{split}.arrow"
