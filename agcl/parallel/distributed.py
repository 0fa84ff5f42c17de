"""The few collectives agcl needs; every function is the identity in a single process."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def world_size() -> int:
    """Number of workers."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number of this worker, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def barrier() -> None:
    """Wait for every worker."""
    if world_size() > 1:
        dist.barrier()


def in_turn(number: int) -> Iterator[tuple[int, bool]]:
    """Which of so many pieces of work this worker takes, and whether each counts.

    All workers take equally many, since a sharded model's forward needs them all: who has no piece
    left takes the last one again, in the time of the others, and what comes of it must not count.
    """
    for first in range(0, number, world_size()):
        mine = first + rank()
        yield min(mine, number - 1), mine < number


def sum_in_place(tensors: Iterable[Tensor]) -> None:
    """Add the same tensor of every worker, in place, as one flat message a dtype."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors if world_size() > 1 else ():
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    for same in by_dtype.values():
        flat = torch.cat([t.reshape(-1) for t in same])
        dist.all_reduce(flat)
        for tensor, part in zip(same, flat.split([t.numel() for t in same]), strict=True):
            tensor.copy_(part.view_as(tensor))


def gather(tensor: Tensor) -> list[Tensor]:
    """The same-shaped tensor of every worker, in rank order."""
    if world_size() == 1:
        return [tensor]
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return parts


def broadcast(tensor: Tensor, source: int) -> Tensor:
    """The same-shaped tensor of one worker, on every worker, in place."""
    if world_size() > 1:
        dist.broadcast(tensor, source)
    return tensor


def broadcast_object(value: T) -> T:
    """The first worker's value, which must be picklable, on every worker."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values)
    return values[0]
