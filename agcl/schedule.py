"""Learning-rate schedules over a task's steps.

The config imports this module, so torch is imported for type checking only.
"""

import math
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch.optim import Optimizer

Schedule = Literal["constant", "linear", "cosine"]
"""After warmup: stay constant, or decay toward 0 linearly or along half a cosine."""


def rate_factor(step: int, num_steps: int, *, schedule: Schedule, warmup: float) -> float:
    """Learning-rate multiplier of a step (1 to `num_steps`), in (0, 1].

    Rises linearly over the first `warmup * num_steps` steps to 1 at the last of them; without
    warmup the first step has 1. Like transformers' schedules, except that no step has rate 0.
    """
    warmup_steps = round(warmup * num_steps)
    if step <= warmup_steps:
        return step / warmup_steps
    left = (num_steps - step + 1) / (num_steps - warmup_steps)
    match schedule:
        case "constant":
            return 1.0
        case "linear":
            return left
        case "cosine":
            return 0.5 * (1 - math.cos(math.pi * left))


def scale_rates(optimizer: "Optimizer", factor: float) -> None:
    """Set every group's learning rate to `factor` times its initial one."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group.setdefault("initial_lr", group["lr"])
