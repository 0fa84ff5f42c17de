"""The training loop: one task, one optimizer, fixed global batches."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from transformers import PreTrainedModel

from agcl.files.checkpoint import Checkpoint
from agcl.loss import Loss, summed_loss
from agcl.model.forward import Precision, autocast
from agcl.parallel import distributed, gradients, sharding
from agcl.schedule import Schedule, rate_factor, scale_rates
from agcl.tasks import Rows
from agcl.tasks.batches import collate, micro_batches, pack, shuffled

Log = Callable[[dict[str, float], int], None]
"""Called with the metrics of a step and the step number."""


class NonFiniteLoss(ArithmeticError):
    """The loss, the penalty or the gradient norm became NaN or infinite."""


def train_task(
    model: PreTrainedModel,
    rows: Rows,
    optimizer: torch.optim.Optimizer,
    *,
    epochs: int,
    batch_size: int,
    micro_batch_size: int | None = None,
    max_tokens: int | None = None,
    seed: int,
    schedule: Schedule = "constant",
    warmup: float = 0.0,
    precision: Precision = "float32",
    packing: bool = False,
    max_gradient_norm: float = 1.0,
    loss_of: Loss = summed_loss,
    penalise: Callable[[], Tensor] | None = None,
    checkpoint: Checkpoint | None = None,
    measure: Callable[[Sequence[int]], dict[str, float]] = lambda lengths: {},
    log: Log = lambda metrics, step: None,
) -> None:
    """Minimize the mean loss of the answer tokens of every global batch.

    The micro-batches of a global batch are distributed round-robin over ranks, and their summed
    loss is divided by the total number of answer tokens in the global batch. Order, batches and
    loss are therefore the same for any number of ranks. A micro-batch has at most
    `micro_batch_size` rows and `max_tokens` tokens (see `micro_batches`).

    `schedule` and `warmup`: see `rate_factor`; the optimizer's learning rate is the peak rate.
    `packing` avoids padding; results agree up to rounding. `loss_of` returns the summed loss of a
    micro-batch (see `agcl/loss.py`). `penalise` adds the gradient of a penalty to `.grad`, the same
    on every rank, and returns the penalty, which the logged loss excludes. `measure` is called
    after each step with the row lengths of the global batch and returns more metrics to log, such
    as those of `throughput.meter`. With a `checkpoint`, resume after its last step and log its
    steps again; on a CPU the result is bit-identical to an uninterrupted run (on a GPU, attention
    may round differently each time). Raises `NonFiniteLoss`.
    """
    model.train()
    device = model.device
    batched = pack if packing else collate
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    parameters = list(trained.values())
    num_steps = epochs * math.ceil(len(rows) / batch_size)
    steps = checkpoint.restore(trained, optimizer) if checkpoint else []
    for metrics, step in steps:
        log(metrics, step)
    step, done = 0, len(steps)
    for epoch in range(epochs):
        for indices in shuffled(len(rows), batch_size, seed=seed, epoch=epoch):
            step += 1
            if step <= done:
                continue
            batch = [rows[i] for i in indices]
            lengths = [len(row.input_ids) for row in batch]
            num_answer_tokens = sum(row.loss_tokens for row in batch)
            pieces = micro_batches(
                lengths,
                max_rows=micro_batch_size,
                max_tokens=max_tokens,
                packing=packing,
            )
            loss = torch.zeros((), device=device)
            optimizer.zero_grad()
            turns = list(distributed.in_turn(len(pieces)))
            for turn, (number, counts) in enumerate(turns, start=1):
                piece = batched([batch[i] for i in pieces[number]]).to(device)
                torch.manual_seed(_dropout_seed(seed, step, number))
                with gradients.summed(parameters) if turn == len(turns) else nullcontext():
                    with autocast(device, precision):
                        part = counts * loss_of(model, piece) / num_answer_tokens
                    part.backward()
                loss += part.detach()
            distributed.sum_in_place([loss])
            penalty = torch.zeros((), device=device) if penalise is None else penalise().detach()
            norm = sharding.whole(torch.nn.utils.clip_grad_norm_(parameters, max_gradient_norm))
            # One device sync per step: any NaN or infinite gradient makes the norm non-finite.
            if not torch.isfinite(loss + penalty + norm):
                raise _non_finite(loss, norm, step, num_steps)
            scale_rates(optimizer, rate_factor(step, num_steps, schedule=schedule, warmup=warmup))
            optimizer.step()
            metrics = {
                "loss": loss.item(),
                "gradient_norm": norm.item(),
                "learning_rate": optimizer.param_groups[0]["lr"],
                "of_steps": num_steps,
                **({} if penalise is None else {"penalty": penalty.item()}),
                **measure(lengths),
            }
            log(metrics, step)
            if checkpoint:
                steps.append((metrics, step))
                checkpoint.write_if_due(trained, optimizer, steps)
    model.zero_grad()


def _dropout_seed(seed: int, step: int, piece: int) -> int:
    """A seed per (run, step, micro-batch), so that dropout does not depend on the rank."""
    return hash((seed, step, piece)) % 2**63


def _non_finite(loss: Tensor, norm: Tensor, step: int, num_steps: int) -> NonFiniteLoss:
    return NonFiniteLoss(
        f"loss {loss.item()} with gradient norm {norm.item()} at step {step} of {num_steps}; lower "
        "the learning rate, or the strength of a penalty or of loss.reference, or use precision "
        "float32"
    )
