"""Checkpoints within a task, so that interrupted training resumes where it stopped."""

import glob
import json
import re
import secrets
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from agcl.errors import InputError
from agcl.files import shards, tensor_file
from agcl.files import training_state as state
from agcl.parallel import distributed

_KIND = "checkpoint"
_FULL = re.compile("No space left|Disk quota exceeded")  # safetensors gives no errno.
_MAX_TIME_SHARE = 1 / 20
"""Maximum fraction of the time spent writing checkpoints."""

_MAX_PARTS = 2**16
_WRITTEN, _NOT_COPIED, _FAILED, _FULL_DISK = range(4)
"""How writing ended on a rank; the worst one counts."""

Steps = list[tuple[dict[str, float], int]]
"""Metrics and step number of every step so far."""


_Content = tuple[dict[str, Tensor], Steps, dict[str, Any]]
"""Tensors, steps and header of the file."""
_NOTHING: _Content = ({}, [], {})


def _nothing(file: Path) -> None:
    pass


class Checkpoint:
    """A file that training writes periodically and resumes from, on any number of ranks.

    It holds the trained weights and optimizer state after a step, and the metrics logged up to it.
    Only rank 0 reads and writes it; it sends the content to the other ranks. The rows of sharded
    tensors are in parts beside it (`shards`), one per rank that wrote. The file is written after
    all parts: without it they are never used.
    """

    def __init__(
        self,
        file: Path,
        identity: str,
        seconds: float,
        *,
        download: Callable[[Path], None] = _nothing,
        upload: Callable[[Path], None] = _nothing,
        delete: Callable[[Path], None] = _nothing,
    ) -> None:
        """A file with another `identity`, or a damaged one, is ignored.

        Written every `seconds`, less often if that would cost more than 5 % of the time. The three
        functions keep a copy of the file elsewhere, in case this machine is lost.
        """
        self.file, self.identity, self.seconds = file, identity, seconds
        self.download, self.upload, self.delete = download, upload, delete
        self.warn: Callable[[str], None] = lambda line: None
        """Called with what went wrong with the file, since none of it ends training."""
        self.resumed: Callable[[dict[str, float], int], None] = lambda metrics, step: None
        """Called on every rank with the last step before the file, once that is loaded."""
        self.last_write, self.write_seconds = time.monotonic(), 0.0
        self.slot, self.parts = 1, list[Path]()
        """Step of the last complete checkpoint."""

    def restore(self, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer) -> Steps:
        """Load weights and optimizer state; return the steps before the checkpoint.

        Without a usable file, change nothing and return no steps. Collective: call on every rank.
        """
        # A machine that a run comes back to may have an old file and not its parts.
        for refresh in (False, True):
            tensors, steps, header = self._read(refresh) if distributed.rank() == 0 else _NOTHING
            distributed.meet()  # Rank 0 may have downloaded it.
            layout = {key: (tensor.shape, tensor.dtype) for key, tensor in tensors.items()}
            steps, header, layout = distributed.broadcast_object((steps, header, layout))
            parts = shards.paths(self.file, header.get("slot", 0), header.get("parts", 0))
            shards.download(parts, partial(self._elsewhere, self.download), again=refresh)
            layouts = shards.layouts(parts, self._stamp(header.get("attempt")))
            if layouts is not None and state.fits(parameters, layout, layouts):
                state.load(parameters, optimizer, tensors, layout)
                shards.load(parts, layouts, partial(state.rows_of, parameters, optimizer))
                self.slot, self.parts = header.get("slot", 1), parts
                if steps:
                    self.resumed(*steps[-1])
                return steps
            if not parts:
                break
        return []

    def write_if_due(
        self, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer, steps: Steps
    ) -> None:
        """Write the file if it is due and the disk has room. Collective: call on every rank."""
        started = time.monotonic()
        interval = max(self.seconds, self.write_seconds / _MAX_TIME_SHARE)
        due = started - self.last_write >= interval
        # Rank 0 decides, since clocks differ. The number tells this write from any other.
        device = optimizer.param_groups[0]["params"][0].device
        attempt = torch.tensor(1 + secrets.randbits(62) if due else 0, device=device)
        if number := int(distributed.broadcast(attempt, 0)):
            self._write(state.held(parameters, optimizer), steps, number, device)
            self.last_write = time.monotonic()
            self.write_seconds = self.last_write - started

    def remove(self) -> None:
        """Delete the file and its parts, if they exist, and on rank 0 their copies elsewhere.

        Call it on rank 0 first: parts without the file are never used.
        """
        leftover = self.file.parent.glob(f"{glob.escape(self.file.name)}-*")
        parts = {*self.parts, *leftover}
        if parts:  # An interrupted write may have left more of them elsewhere.
            count = max(len(self.parts), distributed.world_size())
            parts.update(*(shards.paths(self.file, slot, count) for slot in (0, 1)))
        self.parts = []
        for file in [self.file] * (distributed.rank() == 0) + sorted(parts):
            file.unlink(missing_ok=True)
            if distributed.rank() == 0:
                self._elsewhere(self.delete, file)

    def _write(
        self, held: Mapping[str, Tensor], steps: Steps, attempt: int, device: torch.device
    ) -> None:
        """Write the parts, then the file. On an error the last checkpoint stays."""
        split = {key: tensor for key, tensor in held.items() if isinstance(tensor, DTensor)}
        slot, count, rank = 1 - self.slot, distributed.world_size(), distributed.rank()
        parts = shards.paths(self.file, slot, count) if split else []
        header: dict[str, Any] = {"identity": self.identity}
        ended = _WRITTEN
        if parts:
            stamp = self._stamp(attempt)
            header |= {"attempt": attempt, "slot": slot, "parts": count}
            ended = self._try(lambda: shards.write(parts[rank], split, stamp))
            if ended == _WRITTEN and not self._elsewhere(self.upload, parts[rank]):
                ended = _FAILED
            ended = _worst(ended, device)
        if rank == 0 and ended == _WRITTEN:
            tensors = {key: t.detach().cpu() for key, t in held.items() if key not in split}
            # Steps are stored as a tensor because the header's length is limited.
            text = bytearray(json.dumps(steps).encode())
            tensors["steps"] = torch.frombuffer(text, dtype=torch.uint8)
            ended = self._try(lambda: tensor_file.write(self.file, tensors, _KIND, header))
            if ended == _WRITTEN and not self._elsewhere(self.upload, self.file):
                ended = _NOT_COPIED
        ended = _worst(ended, device)
        if ended == _FULL_DISK:
            self.remove()  # Free the space: the stage's result needs it.
            if rank == 0:
                self.warn("no space left for a checkpoint; the last one was deleted")
            return
        unused = parts
        if ended < _FAILED:
            unused, self.slot, self.parts = self.parts, slot, parts
        for part in unused[rank::count]:
            part.unlink(missing_ok=True)
            if ended != _NOT_COPIED:  # Else the copy elsewhere is still that of the last write.
                self._elsewhere(self.delete, part)

    def _try(self, write: Callable[[], None]) -> int:
        """Call a function that writes a file; say what went wrong."""
        try:
            write()
        except (OSError, SafetensorError) as error:
            if _FULL.search(str(error)):
                return _FULL_DISK
            self.warn(f"cannot write a checkpoint ({error}); the last one is kept")
            return _FAILED
        return _WRITTEN

    def _elsewhere(self, do: Callable[[Path], None], file: Path) -> bool:
        """Make, read or delete the copy; training continues if that fails."""
        try:
            do(file)
        except OSError as error:
            self.warn(f"the checkpoint's copy: {error}")
            return False
        return True

    def _stamp(self, attempt: Any) -> dict[str, Any]:
        return {"identity": self.identity, "attempt": attempt}

    def _read(self, refresh: bool) -> _Content:
        if refresh or not self.file.exists():
            self._elsewhere(self.download, self.file)
        try:
            tensor_file.verify(self.file, _KIND)
            stored, header = tensor_file.open_file(self.file, _KIND)
        except InputError:
            return _NOTHING
        with stored:
            if header.get("identity") != self.identity or not _names_parts(header):
                return _NOTHING
            tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
        steps: Steps = [tuple(each) for each in json.loads(bytes(tensors.pop("steps").numpy()))]
        return tensors, steps, header


def _names_parts(header: Mapping[str, Any]) -> bool:
    slot, count = header.get("slot", 0), header.get("parts", 0)
    return slot in (0, 1) and type(count) is int and 0 <= count <= _MAX_PARTS


def _worst(ended: int, device: torch.device) -> int:
    """How writing ended on the rank where it ended worst. Ranks may write and upload for long."""
    distributed.meet()
    return max(int(each) for each in distributed.gather(torch.tensor(ended, device=device)))
