"""Timing two things in turn, and the ratio of the two."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

import torch
from transformers import PreTrainedModel

from agcl.errors import InputError
from agcl.model.forward import Precision
from agcl.tasks import Encoded, EncodedRows
from agcl.tasks.batches import Batch, collate

Run = Callable[[], object]


@dataclass(frozen=True)
class Figure:
    """One ratio: what is measured, against what, and the bar that it has to stay below."""

    name: str
    against: str
    bar: float
    median: float
    low: float
    high: float
    """Quartiles of the ratio over the pairs."""
    values: tuple[float, float]
    """Medians of what is measured and of what it is held against."""
    unit: str = "s"
    note: str = ""
    """What else was found."""


@dataclass(frozen=True)
class Setting:
    """What all figures are measured on."""

    model: PreTrainedModel
    rows: list[Encoded]
    pairs: int
    batches: int = 4
    """Of these rows, in an attribution: the more, the less it counts that it makes and empties its
    running values."""
    precision: Precision = "float32"
    """Of forward and backward passes: bfloat16 means autocast."""

    @property
    def batch(self) -> Batch:
        """All rows, on the model's device."""
        return collate(self.rows).to(self.model.device)

    @property
    def device(self) -> torch.device:
        """The model's."""
        return self.model.device

    @property
    def num_weights(self) -> int:
        """The model's parameters, tied ones once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def on_gpu(self) -> bool:
        """Whether the model is on a GPU."""
        return self.device.type == "cuda"


def random_rows(number: int, tokens: int, answer: int | None = None) -> list[Encoded]:
    """Rows of random tokens, a sixth of each the answer, as in Concept-1K, or as many as given."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(3, 500, (number, tokens), generator=generator)
    answer = answer or max(2, tokens // 6)
    return [Encoded([*ids[:-1], 2], tokens - answer) for ids in drawn.tolist()]


def prepared_rows(file: Path, number: int) -> list[Encoded]:
    """The first rows of a prepared split. Raises `InputError` if there is no such file."""
    if not file.is_file():
        raise InputError(f"--rows-of: no file {file}")
    rows = EncodedRows(file)
    return [rows[i] for i in range(min(number, len(rows)))]


def pairs(name: str, what: Run, against: Run, setting: Setting, bar: float, said: str) -> Figure:
    """Time both in turn, the order swapped every time, after one run of each that is not timed."""
    what(), against()
    taken = []
    for number in range(setting.pairs):
        both = [(0, what), (1, against)]
        times = [0.0, 0.0]
        for place, run in both if number % 2 else reversed(both):
            times[place] = seconds(run, setting.model.device)
        taken.append((times[0], times[1]))
    return figure(name, taken, bar, said)


def figure(
    name: str,
    taken: Sequence[tuple[float, float]],
    bar: float,
    said: str,
    unit: str = "s",
    note: str = "",
) -> Figure:
    """The ratio of pairs of measurements: what is measured, and what it is held against."""
    ratios = [one / other for one, other in taken]
    # The default method extrapolates: of two pairs, a quartile may lie below both, or below zero.
    several = len(ratios) > 1
    low, _, high = quantiles(ratios, n=4, method="inclusive") if several else (ratios[0],) * 3
    values = (median(one for one, _ in taken), median(other for _, other in taken))
    return Figure(name, said, bar, median(ratios), low, high, values, unit, note)


def seconds(run: Run, device: torch.device) -> float:
    """How long it takes, with what it leaves to do on a GPU."""
    started = now(device)
    run()
    return now(device) - started


def now(device: torch.device) -> float:
    """Seconds of a clock, when the device has done all that it was told to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
