"""What a training step costs: gated, projected, packed, compiled, and beside a `Trainer`'s."""

import math
from collections.abc import Callable, Sequence
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from agcl.lrp import attributed_linears, weight_of
from agcl.model.forward import compiled
from agcl.modulation import GatedAdamW, random_bases
from agcl.tasks import Encoded
from agcl.tasks.batches import collate, pack
from agcl.train import train_task
from bench.measure import Figure, Run, Setting, figure, now, pairs

_RATE = 1e-12
"""So small that steps leave the weights as they are: with 1e-7, one step changes the loss by as
much as the gradient's sum of magnitudes, which of a large model is seen."""


def gated_step(setting: Setting) -> Figure:
    """A step of the gated optimizer against one of `torch.optim.AdamW(fused=True)`."""
    model = setting.model
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    gate = {n: torch.rand_like(p) for n, p in model.named_parameters() if p.dim() == 2}
    gated = GatedAdamW(model.named_parameters(), gate=gate, lr=_RATE)
    plain = torch.optim.AdamW(model.parameters(), lr=_RATE, fused=True)
    found = pairs("gated_step", gated.step, plain.step, setting, 1.15, "AdamW(fused=True)")
    model.zero_grad()
    return found


def projected_step(setting: Setting) -> Figure:
    """A training step with a projection (5 % of the directions) against a plain one."""
    model = setting.model
    linears = attributed_linears(model)
    widths = {name: weight_of(module).shape[1] for name, module in linears.items()}
    like = {str(w): torch.empty(w, max(1, round(0.05 * w))) for w in {*widths.values()}}
    of_width = random_bases(like, seed=0)
    basis = {name: of_width[str(width)] for name, width in widths.items()}
    named = [(n, p) for n, p in model.named_parameters() if n in linears]
    model.requires_grad_(False)
    for _, parameter in named:
        parameter.requires_grad_(True)
    options = _options(setting)
    # Of weights in bfloat16, too, a protected step is one with stochastic rounding.
    projected = GatedAdamW(named, basis=basis, lr=_RATE, rounding="stochastic")
    plain = GatedAdamW(named, lr=_RATE, rounding="stochastic")
    plain.state = projected.state  # Two of them would not fit where one does.
    found = pairs(
        "projected_step",
        lambda: train_task(model, setting.rows, projected, **options),
        lambda: train_task(model, setting.rows, plain, **options),
        setting,
        1.1 if setting.on_gpu else 1.2,
        "plain step, same weights trained",
    )
    model.requires_grad_(True)
    return found


def packed_step(setting: Setting) -> Figure:
    """A training step on packed rows against one on padded rows; all rows in one micro-batch."""
    packed, padded = _step(setting, packing=True), _step(setting)
    return pairs("packed_step", packed, padded, setting, 1.0, "the step on padded rows")


def compiled_step(setting: Setting) -> Figure:
    """A training step through `torch.compile` against one without, all rows in one micro-batch."""
    plain = _step(setting)

    def through_compile() -> None:
        with compiled(setting.model):
            plain()

    return pairs("compiled_step", through_compile, plain, setting, 1.0, "the step without")


def trainer(setting: Setting) -> Figure:
    """`train_task` against transformers' `Trainer` on the same padded batches, as `batches` steps.

    Timed from the end of the first step, which makes the optimizers' states, to that of the last.
    """
    return _against_trainer("trainer", setting, packing=False)


def trainer_packed(setting: Setting) -> Figure:
    """The same with both on batches that agcl packed."""
    return _against_trainer("trainer_packed", setting, packing=True)


def _against_trainer(name: str, setting: Setting, *, packing: bool) -> Figure:
    ours, theirs = _train_task(setting, packing), _trainer(setting, packing)
    (loss, _), (other, _) = ours(1), theirs(1)
    close = 1e-4 if setting.precision == "float32" else 2e-2
    if not math.isclose(loss, other, rel_tol=close):
        raise AssertionError(f"{name}: the first step's loss is {loss}, the Trainer's {other}")
    steps, taken = setting.batches + 1, []
    for number in range(setting.pairs):
        both = [(0, ours), (1, theirs)]
        times = [0.0, 0.0]
        for place, run in both if number % 2 else reversed(both):
            _, times[place] = run(steps)
        taken.append((times[0], times[1]))
    tokens = setting.batches * sum(len(row.input_ids) for row in setting.rows)
    per_second = [tokens / median(each) for each in zip(*taken, strict=True)]
    note = f"{per_second[0]:.0f} against {per_second[1]:.0f} tokens/s"
    return figure(name, taken, 1.0, "transformers' Trainer", note=note)


Steps = Callable[[int], tuple[float, float]]
"""Takes steps, each on all rows: the first one's loss, and the seconds of all but the first."""


def _train_task(setting: Setting, packing: bool) -> Steps:
    optimizer = GatedAdamW(setting.model.named_parameters(), lr=_RATE)

    def run(steps: int) -> tuple[float, float]:
        ends, losses = [], []

        def log(metrics: dict[str, float], step: int) -> None:
            losses.append(metrics["loss"])
            ends.append(now(setting.device) if step in (1, steps) else 0.0)

        options = {**_options(setting), "epochs": steps, "packing": packing}
        train_task(setting.model, setting.rows, optimizer, log=log, **options)
        return losses[0], ends[-1] - ends[0]

    return run


class _Ends(TrainerCallback):
    """When the first step and the last one ended."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.times = device, []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step in (1, state.max_steps):
            self.times.append(now(self.device))


def _trainer(setting: Setting, packing: bool) -> Steps:
    model, size = setting.model, len(setting.rows)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, fused=True)
    told: dict[str, Any] = {
        "learning_rate": _RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "per_device_train_batch_size": size,
        "train_sampling_strategy": "sequential",
        "bf16": setting.precision == "bfloat16",
        "use_cpu": not setting.on_gpu,
        "logging_strategy": "no",
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }

    def run(steps: int) -> tuple[float, float]:
        with TemporaryDirectory() as folder:
            made = Trainer(
                model,
                TrainingArguments(folder, max_steps=steps, **told),
                train_dataset=setting.rows * steps,
                data_collator=_packed if packing else _padded,
                optimizers=(optimizer, None),
                callbacks=[ends := _Ends(setting.device)],
            )
            made.remove_callback(PrinterCallback)
            loss = made.train().training_loss
        model.zero_grad()
        for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
            vars(model).pop(name, None)  # Under bf16 accelerate wraps the model's own forward.
        return loss, ends.times[-1] - ends.times[0]

    return run


def _padded(rows: Sequence[Encoded]) -> dict[str, Tensor]:
    """The batch that `train_task` takes, with the mask that a Trainer's usual collators make."""
    batch = collate(rows)
    mask = torch.arange(batch.input_ids.shape[1]) < batch.lengths[:, None]
    return {"input_ids": batch.input_ids, "labels": batch.labels, "attention_mask": mask.long()}


def _packed(rows: Sequence[Encoded]) -> dict[str, Tensor | None]:
    batch = pack(rows)
    found = {"input_ids": batch.input_ids, "labels": batch.labels}
    return {**found, "position_ids": batch.position_ids}


def _step(setting: Setting, **changes: Any) -> Run:
    model, options = setting.model, {**_options(setting), **changes}
    optimizer = GatedAdamW(model.named_parameters(), lr=_RATE)
    return lambda: train_task(model, setting.rows, optimizer, **options)


def _options(setting: Setting) -> dict[str, Any]:
    """Of `train_task`: one step on all rows, in one forward pass."""
    size = len(setting.rows)
    sizes = {"epochs": 1, "batch_size": size, "micro_batch_size": size}
    return {**sizes, "seed": 0, "precision": setting.precision}
