"""`PYTHONPATH=tests python -m bench.memory`: what stages take, beside what the formula says.

Each stage runs alone in a new process. Its peak is that of the resident memory beyond what a
process has that imported torch, transformers and agcl. Set MALLOC_MMAP_THRESHOLD_=200000: otherwise
malloc keeps what was freed.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers.utils import logging

from agcl.model import models
from agcl.model.builtin import builtin_tokenizer
from agcl.tasks import TRAIN, EncodedRows
from agcl.throughput import peak_memory
from bench.shapes import save_random
from pipeline.config import loading
from pipeline.estimate.memory import peaks
from pipeline.estimate.setting import Part, RowLength, Setting, total
from pipeline.estimate.shape import shape_of
from pipeline.execution.session import run_stages
from pipeline.plan.plan import Run
from pipeline.plan.stage import ResolvedStage
from pipeline.run import open_run
from pipeline.stages.context import Context
from pipeline.stages.files import CHECKS, rows_file

MIDDLE = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 10,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 8192,
    "tie_word_embeddings": True,
}
"""35 million weights: small enough to try, too large for Python's own memory to matter."""
MEASURED = ("train/2-second", "attribute/2-second", "evaluate/2-second")
_WORDS = "one two three four five six seven eight nine ten eleven twelve".split()
_ROWS = 24


@dataclass(frozen=True)
class Found:
    """A stage's peak beyond an empty process, in bytes, and the parts that were predicted."""

    stage: str
    measured: int
    parts: tuple[Part, ...]

    @property
    def predicted(self) -> int:
        return total(self.parts, on_gpu=False)

    @property
    def ratio(self) -> float:
        """Predicted to measured."""
        return self.predicted / self.measured


def random_llama(folder: Path, sizes: dict[str, Any]) -> Path:
    """Save a Llama of these sizes with random weights, and a tokenizer for the rows."""
    return save_random(folder, sizes, builtin_tokenizer(_WORDS))


def compare(model: Path, scratch: Path, words: int, settings: Sequence[str]) -> list[Found]:
    """Measure a protected training, an attribution and an evaluation; predict them."""
    tasks = []
    for name in ("first", "second"):
        file = scratch / f"{name}.jsonl"
        lines = [_row(number, words, name) for number in range(_ROWS)]
        file.write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
        tasks.append({"name": name, "train": str(file)})
    config = scratch / "config.yaml"
    config.write_text(
        json.dumps(
            {
                "storage": str(scratch / "storage"),
                "model": {"path": str(model)},
                "tasks": {"format": "jsonl", "sequence": tasks},
                "training": {"epochs": 1, "batch_size": 8, "micro_batch_size": 4},
                "importance": {"batch_size": 4, "correct_only": False},
                "base": {"protect": "none"},
                "evaluation": {"batch_size": 4},
                "resources": {"checkpoint_minutes": 0},
            }
        )
    )
    run = open_run(loading.load(config, settings))
    run.config.storage.root.mkdir(parents=True)
    stages = list(run.resolved.values())
    first = next(i for i, stage in enumerate(stages) if stage.name == MEASURED[0])
    # Without the evaluations, on which nothing measured depends.
    _alone(_peak, [s for s in stages[:first] if not s.name.startswith("evaluate")])
    empty = _alone(peak_memory)
    measured = {name: _alone(_peak, [run.resolved[name]]) - empty for name in MEASURED}
    setting = Setting(
        shape_of(models.empty_model(model)), run.config, _longest(run), _share_protected(run)
    )
    predicted = peaks(setting)
    return [Found(name, size, predicted[name.partition("/")[0]]) for name, size in measured.items()]


def _row(number: int, words: int, task: str) -> dict[str, str]:
    chosen = [_WORDS[(number * 7 + place * (place + 3)) % len(_WORDS)] for place in range(words)]
    middle = 3 * words // 4
    return {
        "prompt": " ".join([task, *chosen[:middle]]),
        "answer": " " + " ".join(chosen[middle:]),
    }


def _alone(run: Callable[..., int], *arguments: Any) -> int:
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(run, *arguments).result()


def _peak(stages: list[ResolvedStage]) -> int:
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    run_stages(stages, Context(ray_data=False), lambda records: None)
    return peak_memory()


def _longest(run: Run) -> RowLength:
    rows = list(_prepared(run))
    return RowLength(max(len(row.input_ids) for row in rows), max(row.loss_tokens for row in rows))


def _prepared(run: Run) -> Iterator[Any]:
    for name, stage in run.resolved.items():
        if name.startswith("prepare/"):
            rows = EncodedRows(stage.folder / rows_file(TRAIN))
            yield from (rows[i] for i in range(len(rows)))


def _share_protected(run: Run) -> float:
    """Share of the bases' possible bytes that the last training held."""
    checks = run.resolved["train/2-second"].read(CHECKS)
    shares = (json.loads(checks) if checks else {}).get("directions_by_layer")
    if not shares:
        return 0.0
    weights = dict(models.empty_model(Path(run.config.model.path)).named_parameters())
    widths = {name: weights[name].shape[1] for name in shares if name in weights}
    squares = sum(width**2 for width in widths.values())
    return sum(shares[name] * width**2 for name, width in widths.items()) / squares


def main(arguments: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__)
    parser.add_argument("settings", nargs="*", metavar="key.path=value")
    parser.add_argument("--model", type=Path, help="model folder (default: 35M random weights)")
    parser.add_argument("--sizes", type=json.loads, default=MIDDLE, help="of a random Llama, JSON")
    parser.add_argument("--words", type=int, default=48, help="words per row (default: 48)")
    given = parser.parse_intermixed_args(arguments)
    with TemporaryDirectory() as scratch:
        model = given.model or random_llama(Path(scratch) / "model", given.sizes)
        for found in compare(model, Path(scratch), given.words, given.settings):
            print(
                f"{found.stage:18} measured {found.measured / 1e9:.3f} GB, predicted "
                f"{found.predicted / 1e9:.3f}, ratio {found.ratio:.3f}"
            )
            for part in found.parts:
                print(f"    {part.size / 1e9:8.3f}  {part.name}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
