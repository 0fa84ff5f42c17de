"""Gradients summed over ranks while the backward pass that makes them goes on."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from agcl.parallel import distributed

UNDER_WAY = 2
"""Buckets sent at once at most: one is summed while the next fills."""


@contextmanager
def summed(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Sum the parameters' gradients over all ranks, during the backward pass within.

    The context holds the last backward pass of a step, and no other. A bucket (see
    `distributed.buckets`) is sent as soon as its last gradient is complete, while the pass goes on
    to earlier layers (Li et al. 2020, "PyTorch Distributed", section 3.2.3). Afterwards every
    parameter has a gradient, zeros where no rank's pass reached it. Sharded parameters are left
    to FSDP, which has summed their gradients already.
    """
    replicated = [p for p in parameters if not isinstance(p, DTensor)]
    if distributed.world_size() == 1:
        replicated = []
    # From the last layer to the first, as a pass completes them. Every rank sends in this order,
    # whatever its own pass skips, such as an expert without tokens.
    buckets = list(distributed.buckets(reversed(replicated)))
    missing = [len(bucket) for bucket in buckets]
    number_of = {p: number for number, bucket in enumerate(buckets) for p in bucket}
    unsent = deque(range(len(buckets)))
    under_way: deque[Callable[[], None]] = deque()

    def send_next() -> None:
        if len(under_way) == UNDER_WAY:
            under_way.popleft()()
        bucket = buckets[unsent.popleft()]
        under_way.append(distributed.start_sum([_gradient(p) for p in bucket]))

    def completed(parameter: Tensor) -> None:
        missing[number_of[parameter]] -= 1
        while unsent and not missing[unsent[0]]:
            send_next()

    hooks = [p.register_post_accumulate_grad_hook(completed) for p in replicated]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    while unsent:
        send_next()
    while under_way:
        under_way.popleft()()
    for parameter in parameters:
        _gradient(parameter)


def _gradient(parameter: Tensor) -> Tensor:
    """The parameter's gradient, set to zeros if a backward pass has not reached it."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
