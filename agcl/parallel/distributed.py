"""The collectives agcl needs. In a single process every function is the identity."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import count
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

T = TypeVar("T")
_meetings = count()
BUCKET_BYTES = 25 * 2**20
"""Maximum bytes of a message that sums small tensors: the default of torch's DDP."""


def world_size() -> int:
    """Number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Rank of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def meet() -> None:
    """Wait for all ranks, however long another one takes.

    For ranks that wait, write or transfer something outside of the group: a collective would fail
    after the group's timeout. Ranks count arrivals in the group's store instead. If a rank is lost,
    whoever started the processes has to end the others.
    """
    if world_size() == 1:
        return
    store, key = distributed_c10d._get_default_store(), f"agcl/{next(_meetings)}"
    arrived, pause = store.add(key, 1), 0.001
    while arrived < world_size():
        time.sleep(pause)
        pause = min(2 * pause, 0.2)
        arrived = store.add(key, 0)


def owners(sizes: Sequence[int], ranks: int) -> list[int]:
    """A rank for each item, so that all have about as much: the largest first, to who has least."""
    held, found = [0] * ranks, [0] * len(sizes)
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        found[item] = held.index(min(held))
        held[found[item]] += sizes[item]
    return found


def in_turn(count: int) -> Iterator[tuple[int, bool]]:
    """Round-robin share of this rank as (index, counts).

    All ranks iterate equally often, since a sharded model's forward pass needs them all. A rank
    that runs out repeats the last index with counts=False.
    """
    for first in range(0, count, world_size()):
        index = first + rank()
        yield min(index, count - 1), index < count


def sum_in_place(tensors: Iterable[Tensor]) -> None:
    """Sum each tensor over all ranks, in place.

    Needs one bucket of extra memory. Every rank must pass the same dtypes and shapes in one order.
    """
    for bucket in buckets(tensors if world_size() > 1 else ()):
        start_sum(bucket)()


def buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype that share a message: `BUCKET_BYTES` at most, or one that has more."""
    filling: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        bucket = filling.setdefault(tensor.dtype, [])
        if bucket and sum(t.nbytes for t in bucket) + tensor.nbytes > BUCKET_BYTES:
            yield bucket
            bucket = filling[tensor.dtype] = []
        bucket.append(tensor)
    yield from filling.values()


def start_sum(bucket: Sequence[Tensor]) -> Callable[[], None]:
    """Begin to sum a bucket over all ranks; the returned function waits for the sums.

    Until then the tensors must not be used. A tensor of its own bucket is sent as it is.
    """
    if len(bucket) == 1 and bucket[0].is_contiguous():
        message = bucket[0]
    else:
        message = torch.cat([t.reshape(-1) for t in bucket])
    work = dist.all_reduce(message, async_op=True)

    def finish() -> None:
        work.wait()
        if message is bucket[0]:
            return
        for tensor, part in zip(bucket, message.split([t.numel() for t in bucket]), strict=True):
            tensor.copy_(part.view_as(tensor))

    return finish


def gather(tensor: Tensor) -> list[Tensor]:
    """Every rank's tensor, in rank order. Shapes must be equal."""
    if world_size() == 1:
        return [tensor]
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return parts


def broadcast(tensor: Tensor, source: int) -> Tensor:
    """Overwrite the tensor on every rank with that of rank `source`. Shapes must be equal."""
    if world_size() > 1:
        dist.broadcast(tensor, source)
    return tensor


def broadcast_object(value: T, source: int = 0) -> T:
    """The value of rank `source`, on every rank. It must be picklable."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values, source)
    return values[0]


def of_rank_zero(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Rank 0's tensors, which other ranks computed too but may have rounded differently.

    Shapes may differ, names may not. They are sent through `device`, since nccl takes nothing from
    the CPU. Names that share a tensor still do.
    """
    if world_size() == 1:
        return dict(tensors)
    firsts: dict[int, str] = {}
    first_of = {name: firsts.setdefault(id(tensor), name) for name, tensor in tensors.items()}
    shapes = broadcast_object({name: tensors[name].shape for name in firsts.values()})
    found: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        own = tensors[name] if tensors[name].shape == shape else tensors[name].new_empty(shape)
        sent = torch.empty(shape, dtype=own.dtype, device=device)
        if rank() == 0:
            sent.copy_(own)
        # In place, so that the layout in memory, by which products round, is that of one rank.
        found[name] = own.copy_(broadcast(sent, 0))
    return {name: found[first] for name, first in first_of.items()}
