"""`python -m jobs.bench`: what attribution and protection cost, as ratios measured side by side.

Every figure is a ratio of two things done in turn in one process, on the same model and rows: the
median over pairs, with the quartiles. `--model` takes a folder as `model.path` does.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from agcl import models
from agcl.attribution import attribute
from agcl.batches import Batch, collate
from agcl.evaluate import exact_match
from agcl.generate import generate
from agcl.lrp import attributed_linears, weight_of
from agcl.modulation import GatedAdamW, random_bases
from agcl.tasks import Encoded
from agcl.train import summed_loss, train_task

_BATCHES = 4
"""Batches an attribution, so that setting up its running values counts as little as in a run."""
Run = Callable[[], object]


@dataclass(frozen=True)
class Figure:
    """One ratio: what is measured, against what, and the bar that it has to stay below."""

    name: str
    what: str
    against: str
    bar: float | None
    median: float
    low: float
    high: float
    """Quartiles of the ratio."""
    seconds: tuple[float, float]
    """Medians of what is measured and of what it is held against."""


@dataclass(frozen=True)
class Setting:
    """What all figures are measured on."""

    model: PreTrainedModel
    rows: list[Encoded]
    pairs: int

    @property
    def batch(self) -> Batch:
        """All rows, on the model's device."""
        return collate(self.rows).to(self.model.device)


def attribution_against_training(setting: Setting) -> Figure:
    """Attributing batches, K = 4, against a plain forward and backward of each."""
    model, batch = setting.model, setting.batch

    def plain() -> None:
        for _ in range(_BATCHES):
            summed_loss(model, batch).backward()
            model.zero_grad()

    return _pairs("attribute", _attributed(setting), plain, setting, 1.3, "forward + backward")


def attribution_against_a_loop(setting: Setting) -> Figure:
    """Attributing batches, K = 4, against single samples with weight gradients."""
    model = setting.model
    weights = {n: weight_of(m).detach() for n, m in attributed_linears(model).items()}
    stacks = {n: torch.full((4, *w.shape), -torch.inf) for n, w in weights.items()}
    top = {name: stack.to(model.device) for name, stack in stacks.items()}
    parameters = dict(model.named_parameters())

    def loop() -> None:
        for row in setting.rows * _BATCHES:
            summed_loss(model, collate([row]).to(model.device)).backward()
            for name, stack in top.items():
                gradient = parameters[name].grad
                assert gradient is not None
                value = (gradient if gradient.shape == stack.shape[1:] else gradient.T).clone()
                value *= weights[name]
                for slot in stack:
                    low = torch.minimum(slot, value)
                    torch.maximum(slot, value, out=slot)
                    value = low
            model.zero_grad()

    return _pairs("attribute_loop", _attributed(setting), loop, setting, 0.35, "single samples")


def gated_step(setting: Setting) -> Figure:
    """A step of the gated optimizer against one of `torch.optim.AdamW(foreach=True)`."""
    model = setting.model
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    gate = {n: torch.rand_like(p) for n, p in model.named_parameters() if p.dim() == 2}
    gated = GatedAdamW(model.named_parameters(), gate=gate, lr=1e-7)
    plain = torch.optim.AdamW(model.parameters(), lr=1e-7, foreach=True)
    figure = _pairs("gated_step", gated.step, plain.step, setting, 1.15, "AdamW(foreach=True)")
    model.zero_grad()
    return figure


def projected_step(setting: Setting) -> Figure:
    """A training step with a projection (5 % of the directions) against a plain one."""
    model = setting.model
    linears = attributed_linears(model)
    widths = {name: weight_of(module).shape[1] for name, module in linears.items()}
    like = {name: torch.empty(w, max(1, round(0.05 * w))) for name, w in widths.items()}
    named = [(n, p) for n, p in model.named_parameters() if n in linears]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for _, parameter in named:
        parameter.requires_grad_(True)
    basis = random_bases(like, seed=0)
    size = len(setting.rows)
    options: dict[str, Any] = {"epochs": 1, "batch_size": size, "micro_batch_size": size, "seed": 0}
    projected = GatedAdamW(named, basis=basis, lr=1e-7)
    plain = GatedAdamW(named, lr=1e-7)
    figure = _pairs(
        "projected_step",
        lambda: train_task(model, setting.rows, projected, **options),
        lambda: train_task(model, setting.rows, plain, **options),
        setting,
        1.25,
        "plain step, same weights trained",
    )
    model.requires_grad_(True)
    return figure


def exact_match_against_generate(setting: Setting) -> Figure:
    """Exact match by one forward pass against greedy decoding of the same rows."""
    model, rows = setting.model, setting.rows
    prompts = [row.input_ids[: row.prompt_tokens] for row in rows]
    answers = [row.input_ids[row.prompt_tokens : -1] for row in rows]
    end = rows[0].input_ids[-1]
    longest = max(map(len, answers)) + 1

    def decoded() -> list[bool]:
        found = generate(model, prompts, end=end, max_new_tokens=longest, batch_size=len(rows))
        return [ids == answer for ids, answer in zip(found, answers, strict=True)]

    def forced() -> list[bool]:
        return exact_match(model, rows, batch_size=len(rows))

    assert forced() == decoded()
    return _pairs("exact_match", forced, decoded, setting, 0.2, "generate, same verdicts")


FIGURES = {
    "attribute": attribution_against_training,
    "attribute_loop": attribution_against_a_loop,
    "gated_step": gated_step,
    "projected_step": projected_step,
    "exact_match": exact_match_against_generate,
}


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; 0 also where a bar is missed."""
    parser = argparse.ArgumentParser(prog="python -m jobs.bench", description=__doc__)
    parser.add_argument("figures", nargs="*", help=f"some of {', '.join(FIGURES)} (default: all)")
    parser.add_argument("--model", default=models.BUILTIN, help="model folder (default: builtin)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--pairs", type=int, default=7, help="measurements (default: 7)")
    parser.add_argument("--rows", type=int, default=8, help="rows a batch (default: 8)")
    parser.add_argument("--tokens", type=int, default=24, help="tokens a row (default: 24)")
    parser.add_argument("--json", type=Path, help="file for the figures as JSON")
    given = parser.parse_args(arguments)
    if unknown := set(given.figures) - FIGURES.keys():
        parser.error(f"no figure {', '.join(sorted(unknown))}")
    torch.set_num_threads(given.threads)
    setting = Setting(_model(given.model, given.device), _rows(given), given.pairs)
    size = sum(parameter.numel() for parameter in setting.model.parameters())
    print(
        f"{given.model}: {size / 1e6:.1f}M parameters, {given.rows} x {given.tokens} tokens, "
        f"{given.device}, {given.threads} threads, {given.pairs} pairs"
    )
    figures = []
    for name in given.figures or FIGURES:
        figure = FIGURES[name](setting)
        figures.append(figure)
        verdict = "ok" if figure.bar is None or figure.median <= figure.bar else "missed"
        print(
            f"{figure.name:16} {figure.median:6.3f} [{figure.low:.3f}, {figure.high:.3f}] of "
            f"{figure.against} (bar {figure.bar}: {verdict}; {figure.seconds[0]:.3f} s / "
            f"{figure.seconds[1]:.3f} s)",
            flush=True,
        )
    if given.json:
        given.json.write_text(json.dumps([asdict(figure) for figure in figures], indent=1) + "\n")
    return 0


def _attributed(setting: Setting) -> Run:
    batch = setting.batch

    def run() -> None:
        attribute(setting.model, [batch] * _BATCHES, top_k=4, correct_only=False)

    return run


def _pairs(name: str, what: Run, against: Run, setting: Setting, bar: float, said: str) -> Figure:
    """Time both in turn, the order swapped every time, after one run of each that is not timed."""
    what(), against()
    times = []
    for pair in range(setting.pairs):
        both = [(0, what), (1, against)]
        taken = [0.0, 0.0]
        for place, run in both if pair % 2 else reversed(both):
            with _timed(setting.model.device) as stop:
                run()
            taken[place] = stop()
        times.append(taken)
    ratios = [one / other for one, other in times]
    low, _, high = quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
    seconds = (median(one for one, _ in times), median(other for _, other in times))
    text = what.__doc__ or name
    return Figure(name, text, said, bar, median(ratios), low, high, seconds)


@contextmanager
def _timed(device: torch.device) -> Iterator[Callable[[], float]]:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    started = time.perf_counter()
    ended: list[float] = []
    yield lambda: ended[0]
    wait()
    ended.append(time.perf_counter() - started)


def _model(path: str, device: str) -> PreTrainedModel:
    if path == models.BUILTIN:
        return models.builtin_model(512, seed=0).to(device)
    models.check_folder(Path(path))
    return models.load_model(Path(path)).to(device)


def _rows(given: argparse.Namespace) -> list[Encoded]:
    """Rows of random tokens, a sixth of each the answer, as in Concept-1K."""
    generator = torch.Generator().manual_seed(0)
    drawn: Tensor = torch.randint(3, 500, (given.rows, given.tokens), generator=generator)
    answer = max(2, given.tokens // 6)
    return [Encoded([*ids[:-1], 2], given.tokens - answer) for ids in drawn.tolist()]


if __name__ == "__main__":
    sys.exit(main())
