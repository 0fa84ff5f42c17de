"""A sharded model's part of a checkpoint: every rank writes the rows it holds, none gathers.

Each part is a tensor file beside the checkpoint's, whose header names the write it belongs to and
the first row of each tensor. Any number of ranks can read them: each part is read by one rank,
which sends its tensors to the others, one at a time; each takes the rows it holds. Torch's
`distributed.checkpoint` is not used: it pickles its metadata, or expects all files on one disk.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from agcl.errors import InputError
from agcl.files import tensor_file
from agcl.parallel import distributed, sharding

_KIND = "checkpoint part"


class RowRange(NamedTuple):
    """What a part holds of a tensor."""

    first: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def paths(file: Path, slot: int, count: int) -> list[Path]:
    """The parts of the checkpoint `file`, in rank order.

    Writes alternate between two slots, so that the last complete one stays until the next is.
    """
    return [file.with_name(f"{file.name}-{slot}-{rank}") for rank in range(count)]


def write(part: Path, tensors: Mapping[str, Tensor], stamp: Mapping[str, Any]) -> None:
    """Write this rank's rows of sharded tensors. The `stamp` tells writes apart; JSON."""
    own = {key: sharding.local(tensor.detach()).cpu() for key, tensor in tensors.items()}
    own = {key: rows for key, rows in own.items() if len(rows)}
    first = {key: sharding.first_row(tensors[key]) for key in own}
    tensor_file.write(part, own, _KIND, {**stamp, "first_rows": first})


def layouts(parts: list[Path], stamp: Mapping[str, Any]) -> list[dict[str, RowRange]] | None:
    """What each part holds, on every rank; None if one is missing, damaged or of another write.

    Collective: call on every rank; each verifies its share of the parts.
    """
    own = {i: _layout(part, stamp) for i, part in _shared_out(parts).items()}
    distributed.meet()  # Reading takes as long as it takes.
    size = distributed.world_size()
    found = [distributed.broadcast_object(own.get(i), i % size) for i in range(len(parts))]
    complete = [each for each in found if each is not None]
    return complete if len(complete) == len(found) else None


def download(parts: list[Path], fetch: Callable[[Path], object], *, again: bool) -> None:
    """Fetch this rank's share of the parts if they are missing, or all of it `again`."""
    for part in _shared_out(parts).values():
        if again or not part.exists():
            fetch(part)


def are_whole(layouts: list[dict[str, RowRange]], shapes: Mapping[str, torch.Size]) -> bool:
    """Whether the parts' rows make up tensors of these shapes, each row once."""
    pieces: dict[str, list[RowRange]] = defaultdict(list)
    for layout in layouts:
        for key, rows in layout.items():
            pieces[key].append(rows)
    return pieces.keys() == shapes.keys() and all(
        _tile(pieces[key], shape) for key, shape in shapes.items()
    )


def load(
    parts: list[Path],
    layouts: list[dict[str, RowRange]],
    target_of: Callable[[str, torch.dtype], Tensor],
) -> None:
    """Copy the parts' rows into the tensors that `target_of` gives for a key and dtype.

    Collective: call on every rank.
    """
    mine = _shared_out(parts)
    for i, layout in enumerate(layouts):
        stored = tensor_file.open_file(mine[i], _KIND)[0] if i in mine else None
        for key, rows in layout.items():
            target = target_of(key, rows.dtype)
            tensor = stored.get_tensor(key) if stored else torch.empty(rows.shape, dtype=rows.dtype)
            tensor = distributed.broadcast(tensor.to(target.device), i % distributed.world_size())
            sharding.copy_rows(target, tensor, rows.first)


def _shared_out(parts: list[Path]) -> dict[int, Path]:
    """The parts that this rank reads, by number."""
    return dict(list(enumerate(parts))[distributed.rank() :: distributed.world_size()])


def _layout(part: Path, stamp: Mapping[str, Any]) -> dict[str, RowRange] | None:
    try:
        tensor_file.verify(part, _KIND)
        stored, header = tensor_file.open_file(part, _KIND)
    except InputError:
        return None
    first = header.get("first_rows")
    with stored:
        keys = sorted(stored.keys())
        if not stamp.items() <= header.items() or not isinstance(first, dict):
            return None
        if first.keys() != set(keys) or not all(type(row) is int for row in first.values()):
            return None
        tensors = ((key, stored.get_tensor(key)) for key in keys)
        return {key: RowRange(first[key], tuple(t.shape), t.dtype) for key, t in tensors}


def _tile(pieces: list[RowRange], shape: torch.Size) -> bool:
    end = 0
    for piece in sorted(pieces):
        if piece.first != end or piece.shape[1:] != shape[1:]:
            return False
        end += piece.shape[0]
    return end == shape[0]
