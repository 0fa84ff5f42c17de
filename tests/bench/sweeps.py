"""How costs grow: seconds of attribution, beside a plain forward and backward, and of scoring."""

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from agcl.attribution import attribute
from agcl.attribution.attribute import Split
from agcl.tasks.batches import collate
from bench.figures import attributed, exact_match_both_ways, plain_passes
from bench.measure import Run, Setting, random_rows, seconds
from bench.whole import train_stage_seconds

Point = dict[str, float]
"""What was measured at one value of what is swept, in seconds."""


def samples(setting: Setting) -> dict[int, Point]:
    """By rows a batch."""
    tokens = len(setting.rows[0].input_ids)
    return {n: _both(replace(setting, rows=random_rows(n, tokens))) for n in (2, 4, 8, 16, 32)}


def tokens(setting: Setting) -> dict[int, Point]:
    """By tokens a row."""
    number = len(setting.rows)
    return {n: _both(replace(setting, rows=random_rows(number, n))) for n in (12, 24, 48, 96, 192)}


def top_k(setting: Setting) -> dict[int, Point]:
    """By the running values that are kept of every weight."""
    return {k: _both(setting, top_k=k) for k in (1, 2, 4, 8, 16)}


def width(setting: Setting) -> dict[int, Point]:
    """By the width of a Llama of four layers, the cost growing with its square."""
    device = setting.model.device
    return {n: _both(replace(setting, model=_llama(n).to(device))) for n in (128, 256, 512, 1024)}


def answer(setting: Setting) -> dict[int, Point]:
    """Scoring by tokens an answer, after prompts of 20: one forward pass, and `generate`."""
    number = len(setting.rows)
    points: dict[int, Point] = {}
    for n in (2, 4, 8, 16, 32):
        forced, decoded = exact_match_both_ways(
            replace(setting, rows=random_rows(number, 20 + n, answer=n))
        )
        points[n] = {"exact_match": _median(forced, setting), "generate": _median(decoded, setting)}
    return points


def tasks(setting: Setting) -> dict[int, Point]:
    """By the task's number in the sequence: its whole train stage, on the built-in model."""
    return {n: {"train": s} for n, s in train_stage_seconds([2, 5, 10, 20, 30]).items()}


def workers(setting: Setting) -> dict[int, Point]:
    """By the number of gloo workers that share the threads and 16 rows; both ways to split."""
    points: dict[int, Point] = {}
    threads = torch.get_num_threads()
    for number in (1, 2):
        points[number] = {
            split: _on_workers(number, max(1, threads // number), split)
            for split in ("samples", "layers")
        }
    return points


SWEEPS: dict[str, Callable[[Setting], dict[int, Point]]] = {
    sweep.__name__: sweep for sweep in (samples, tokens, top_k, width, answer, tasks, workers)
}


def _both(setting: Setting, top_k: int = 4) -> Point:
    return {
        "attribute": _median(attributed(setting, top_k), setting),
        "forward_backward": _median(plain_passes(setting), setting),
    }


def _median(run: Run, setting: Setting) -> float:
    run()
    return median(seconds(run, setting.model.device) for _ in range(setting.pairs))


def _llama(width: int) -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
        )
    )


def _on_workers(number: int, threads: int, split: Split) -> float:
    """Seconds of an attribution, the slowest worker's."""
    context = get_context("spawn")
    with TemporaryDirectory() as folder:
        place = Path(folder) / "rendezvous"
        arguments = [(rank, number, threads, split, place) for rank in range(number)]
        with context.Pool(number) as pool:
            return max(pool.starmap(_one_worker, arguments, chunksize=1))


def _one_worker(rank: int, number: int, threads: int, split: Split, place: Path) -> float:
    import torch.distributed as dist

    torch.set_num_threads(threads)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=number)
    model, rows = _llama(512), random_rows(16, 24)
    batches = [collate(rows[i : i + 4]) for i in range(0, len(rows), 4)]
    mine: Iterable[Any] = batches if split == "layers" else batches[rank::number]

    def run() -> None:
        attribute(model, mine, correct_only=False, split=split)

    run()
    taken = median(seconds(run, model.device) for _ in range(3))
    dist.destroy_process_group()
    return taken
