"""Peak memory of training, attribution and evaluation, against what `agcl plan` says of it.

The stages' work without their files, so that it can be measured of any shape in seconds.
"""

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from agcl.attribution import attribute
from agcl.attribution.inputs import InputMoment, shared_inputs
from agcl.lrp import attributed_linears
from agcl.modulation import GatedAdamW, random_bases
from agcl.scoring.evaluate import answer_kl, predict
from agcl.throughput import peak_memory
from agcl.train import train_task
from bench.figures import not_decomposed
from bench.measure import Figure, Setting, figure
from pipeline.config import loading
from pipeline.estimate import setting as plan
from pipeline.estimate.memory import peaks
from pipeline.estimate.shape import shape_of

_BAR = 1.1
"""A stage is said to fit into 90 % of a GPU."""
_DIRECTIONS = 0.25
"""Share of every input's directions that the training does not use."""


def train(setting: Setting) -> Figure:
    """Two steps with a projection of all linear layers, the others frozen."""
    model, linears = setting.model, attributed_linears(setting.model)
    model.requires_grad_(False)
    named = [(n, p) for n, p in model.named_parameters() if n in linears]
    for _, parameter in named:
        parameter.requires_grad_(True)
    size = len(setting.rows)

    def run() -> None:
        optimizer = GatedAdamW(named, basis=_bases(setting), lr=1e-7, rounding="stochastic")
        options = {"batch_size": size, "micro_batch_size": size, "precision": setting.precision}
        train_task(model, setting.rows, optimizer, epochs=2, seed=0, **options)

    found = _peak("memory_train", setting, run)
    model.requires_grad_(True)
    return found


def _bases(setting: Setting) -> dict[str, Tensor]:
    """In main memory, as a run has them, and once for all weights that read the same input."""
    reads = shared_inputs(setting.model, attributed_linears(setting.model))
    widths = {name: setting.model.get_parameter(name).shape[1] for name in reads.values()}
    like = {str(w): torch.empty(w, round(_DIRECTIONS * w)) for w in {*widths.values()}}
    of_width = random_bases(like, seed=0)
    by_input = {n: of_width[str(w)].clone() for n, w in widths.items()}
    return {weight: by_input[name] for weight, name in reads.items()}


def attribution(setting: Setting) -> Figure:
    """The moments of two batches with relevance; of every width only one is decomposed."""
    decompose, seen = InputMoment.moment, set()

    def once(moment: InputMoment) -> None:
        if len(moment.sum) not in seen:
            seen.add(len(moment.sum))
            decompose(moment, keep=0.95)

    def run() -> None:
        options = {"moments": "relevance", "entries": False, "correct_only": False}
        options |= {"precision": setting.precision}
        with not_decomposed(once):
            attribute(setting.model, [setting.batch] * 2, **options)

    return _peak("memory_attribute", setting, run)


def evaluation(setting: Setting) -> Figure:
    """Scoring the rows, and comparing with the base model on them."""

    def run() -> None:
        options = {"precision": setting.precision}
        predict(setting.model, setting.rows, batch_size=len(setting.rows), **options)
        base = copy.deepcopy(setting.model)
        answer_kl(setting.model, base, setting.rows, **options)

    return _peak("memory_evaluate", setting, run)


def _peak(name: str, setting: Setting, run: Callable[[], None]) -> Figure:
    with _peaking(setting) as measured:
        run()
    size = measured()
    parts = peaks(_planned(setting))[name.removeprefix("memory_")]
    # What a stage holds in main memory, such as copies for its checks, is not made here.
    predicted = plan.total(parts, on_gpu=True)
    on_device = [part for part in parts if not part.on_host]
    largest = sorted(on_device, key=lambda part: part.size, reverse=True)[:4]
    note = "planned: " + ", ".join(f"{part.name} {part.size / 1e9:.3g}" for part in largest)
    return figure(name, [(size / 1e9, predicted / 1e9)], _BAR, "the plan", "GB", note)


@contextmanager
def _peaking(setting: Setting) -> Iterator[Callable[[], int]]:
    """Bytes at the peak, the model's included: on a GPU those of tensors, else resident ones."""
    weights = sum(p.numel() * p.element_size() for p in setting.model.parameters())
    found: list[int] = []
    gc.collect()
    if setting.on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(setting.device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Resets the peak of resident memory.
    before = peak_memory()
    yield lambda: found[0]
    if setting.on_gpu:
        found.append(torch.cuda.max_memory_allocated(setting.device))
    else:
        found.append(peak_memory() - before + weights)


def _planned(setting: Setting) -> plan.Setting:
    size = len(setting.rows)
    longest = max(len(row.input_ids) for row in setting.rows)
    answer = max(row.loss_tokens for row in setting.rows)
    settings = {
        # Nothing is read from the folder: the shape is the model's.
        "model": {"path": "/", "dtype": str(setting.model.dtype).removeprefix("torch.")},
        "training": {
            "batch_size": size,
            "max_tokens": size * longest,
            "precision": setting.precision,
        },
        "importance": {"batch_size": size, "correct_only": False, "precision": setting.precision},
        "evaluation": {"batch_size": size, "precision": setting.precision},
        "resources": {"gpus_per_worker": int(setting.on_gpu), "checkpoint_minutes": 0},
    }
    config = loading.validate(loading.with_preset("agcl", settings))
    row = plan.RowLength(longest, answer)
    return plan.Setting(shape_of(setting.model), config, row, _DIRECTIONS)
