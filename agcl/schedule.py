"""How the learning rate goes over a task's steps.

The config names the schedules, so torch is not imported here.
"""

import math
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch.optim import Optimizer

Schedule = Literal["constant", "linear", "cosine"]
"""After warming up: stay, or fall towards 0 by a line or by half a cosine."""


def rate_factor(step: int, num_steps: int, *, schedule: Schedule, warmup: float) -> float:
    """What the learning rate is multiplied by in a step, from 1 to `num_steps`; in (0, 1].

    It rises linearly over the first steps, the share `warmup` of them, and is 1 in the last of
    these or else in the first step. As transformers' schedules, but that no step has the rate 0.
    """
    rising = round(warmup * num_steps)
    if step <= rising:
        return step / rising
    left = (num_steps - step + 1) / (num_steps - rising)
    match schedule:
        case "constant":
            return 1.0
        case "linear":
            return left
        case "cosine":
            return 0.5 * (1 - math.cos(math.pi * left))


def scale_rates(optimizer: "Optimizer", factor: float) -> None:
    """Set every group's learning rate to that factor of the one it began with."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group.setdefault("initial_lr", group["lr"])
