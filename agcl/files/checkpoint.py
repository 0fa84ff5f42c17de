"""Checkpoints within a task, so that interrupted training resumes where it stopped."""

import json
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from agcl.errors import InputError
from agcl.files import tensor_file
from agcl.parallel import distributed, sharding

_KIND, _WEIGHT = "checkpoint", "weight"
_FULL = re.compile("No space left|Disk quota exceeded")  # safetensors gives no errno.
_MAX_TIME_SHARE = 1 / 20
"""Maximum fraction of the time spent writing checkpoints."""

Steps = list[tuple[dict[str, float], int]]
"""Metrics and step number of every step so far."""


def _nothing(file: Path) -> None:
    pass


class Checkpoint:
    """A file that training writes periodically and resumes from.

    It holds the trained weights and optimizer state after a step, and the metrics logged up to it.
    Only rank 0 reads and writes it; it sends the content to the other ranks.
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
        self.last_write, self.write_seconds = time.monotonic(), 0.0

    def restore(self, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer) -> Steps:
        """Load weights and optimizer state; return the steps before the checkpoint.

        Without a usable file, change nothing and return no steps. Collective: call on every rank.
        """
        tensors, steps = self._read(parameters) if distributed.rank() == 0 else ({}, [])
        distributed.meet()  # Rank 0 may have downloaded it.
        steps, layout = distributed.broadcast_object(
            (steps, {key: (tensor.shape, tensor.dtype) for key, tensor in tensors.items()})
        )
        for key, (shape, dtype) in layout.items():
            entry, _, name = key.partition("/")
            parameter = parameters[name]
            tensor = tensors.get(key, torch.empty(shape, dtype=dtype)).to(parameter.device)
            distributed.broadcast(tensor, 0)
            if tensor.shape == parameter.shape:
                tensor = sharding.placed_like(tensor, parameter)
            if entry == _WEIGHT:
                parameter.data.copy_(tensor)
            else:
                optimizer.state[parameter][entry] = tensor
        return steps

    def write_if_due(
        self, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer, steps: Steps
    ) -> None:
        """Write the file if it is due and the disk has room. Collective: call on every rank."""
        started = time.monotonic()
        interval = max(self.seconds, self.write_seconds / _MAX_TIME_SHARE)
        due = started - self.last_write >= interval
        if any(isinstance(parameter, DTensor) for parameter in parameters.values()):
            due = distributed.broadcast_object(due)  # Gathering needs all ranks.
        elif distributed.rank() > 0:
            return
        if due:
            self._write(parameters, optimizer, steps)
            self.last_write = time.monotonic()
            self.write_seconds = self.last_write - started

    def remove(self) -> None:
        """Delete the file, if it exists, and its copy elsewhere."""
        self.file.unlink(missing_ok=True)
        self._elsewhere(self.delete)

    def _write(
        self, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer, steps: Steps
    ) -> None:
        held: dict[str, Tensor] = {}
        for name, parameter in parameters.items():
            held[f"{_WEIGHT}/{name}"] = parameter
            for entry, value in optimizer.state.get(parameter, {}).items():
                held[f"{entry}/{name}"] = value
        tensors = dict(sharding.on_rank_zero(held.items()))
        if distributed.rank() > 0:
            return
        # Steps are stored as a tensor because the header's length is limited.
        tensors["steps"] = torch.frombuffer(
            bytearray(json.dumps(steps).encode()), dtype=torch.uint8
        )
        try:
            tensor_file.write(self.file, tensors, _KIND, {"identity": self.identity})
        except (OSError, SafetensorError) as error:
            if _FULL.search(str(error)):
                self.remove()  # Free the space: the stage's result needs it.
                self.warn("no space left for a checkpoint; the last one was deleted")
            else:
                self.warn(f"cannot write a checkpoint ({error}); the last one is kept")
            return
        self._elsewhere(self.upload)

    def _elsewhere(self, do: Callable[[Path], None]) -> None:
        """Make, read or delete the copy; training goes on without it."""
        try:
            do(self.file)
        except OSError as error:
            self.warn(f"the checkpoint's copy: {error}")

    def _read(self, parameters: Mapping[str, nn.Parameter]) -> tuple[dict[str, Tensor], Steps]:
        if not self.file.exists():
            self._elsewhere(self.download)
        try:
            tensor_file.verify(self.file, _KIND)
            stored, header = tensor_file.open_file(self.file, _KIND)
        except InputError:
            return {}, []
        with stored:
            if header.get("identity") != self.identity:
                return {}, []
            tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
        steps: Steps = [tuple(each) for each in json.loads(bytes(tensors.pop("steps").numpy()))]
        names = {key.partition("/")[2] for key in tensors}
        return (tensors, steps) if names == set(parameters) else ({}, [])
