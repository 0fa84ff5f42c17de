"""A whole run of two tasks by the command `agcl run`, on rows made up for it."""

import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from agcl.model.builtin import builtin_tokenizer
from bench.measure import Figure, figure
from bench.shapes import SHAPES, save_random

_WORDS = "one two three four five six seven eight nine ten eleven twelve".split()
_ROOT = Path(__file__).parents[2]


def two_tasks(model: str, device: str, precision: str, rows: int, tokens: int) -> Figure:
    """Seconds of the run, against those of its stages' own work; starting Ray is in the former.

    Each task has eight batches of `rows` rows, of `tokens` tokens at most. Every stage's seconds
    and the training's highest memory are noted.
    """
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        config = _config(folder, model, device, precision, rows, tokens)
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "jobs", "run", str(config)],
            cwd=_ROOT,
            capture_output=True,
            text=True,
        )
        taken = time.perf_counter() - started
        if done.returncode:
            last = [*done.stdout.splitlines(), *done.stderr.splitlines()][-1:]
            raise RuntimeError(f"agcl run ended with {done.returncode}: {' '.join(last)}")
        manifests = map(
            json.loads, (f.read_text() for f in folder.glob("*/stages/*/manifest.json"))
        )
        seconds = {each["stage"]: each["seconds"] for each in manifests}
        logs = [file.read_text() for file in folder.glob("storage/stages/train-*/log.jsonl")]
    lines = [json.loads(line) for log in logs for line in log.splitlines()]
    note = ", ".join(f"{name} {value:.1f} s" for name, value in sorted(seconds.items()))
    memory = max(line["peak_memory_gb"] for line in lines)
    pace = median(line["tokens_per_second"] for line in lines)
    note += f"; training takes {memory:.2f} GB at most, {pace:.0f} tokens/s"
    return figure(
        "two_tasks", [(taken, sum(seconds.values()))], float("inf"), "its stages", note=note
    )


def _config(folder: Path, model: str, device: str, precision: str, rows: int, tokens: int) -> Path:
    base = Path(model)
    if model in SHAPES:
        base = save_random(folder / "model", SHAPES[model], builtin_tokenizer(_WORDS))
    tasks = []
    for name in ("first", "second"):
        file = folder / f"{name}.jsonl"
        made = [json.dumps(_row(number, tokens, name)) for number in range(8 * rows)]
        file.write_text("\n".join(made) + "\n", encoding="utf-8")
        tasks.append({"name": name, "train": str(file)})
    on_gpu = device != "cpu"
    settings: dict[str, Any] = {
        "storage": str(folder / "storage"),
        "model": {"path": str(base)},
        "tasks": {"format": "jsonl", "sequence": tasks},
        "training": {"epochs": 2, "batch_size": rows, "precision": precision},
        # Random weights answer nothing correctly.
        "importance": {"batch_size": rows, "precision": precision, "correct_only": False},
        "evaluation": {"precision": precision},
        "resources": {"gpus_per_worker": int(on_gpu), "cpus_per_worker": 4 if on_gpu else 1},
    }
    config = folder / "config.yaml"
    config.write_text(json.dumps(settings), encoding="utf-8")
    return config


def _row(number: int, tokens: int, task: str) -> dict[str, str]:
    # The tokenizer was trained on the words alone, so with its space a word is about two tokens.
    words = tokens // 2 - 4
    chosen = [_WORDS[(number * 7 + place * (place + 3)) % len(_WORDS)] for place in range(words)]
    answer = max(1, words // 6)
    return {
        "prompt": " ".join([task, *chosen[:-answer]]),
        "answer": " " + " ".join(chosen[-answer:]),
    }
