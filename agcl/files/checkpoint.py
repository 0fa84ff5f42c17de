"""Checkpoints within a task, so that interrupted training resumes where it stopped."""

import json
import time
from collections.abc import Mapping
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
_MAX_TIME_SHARE = 1 / 20
"""Maximum fraction of the time spent writing checkpoints."""

Steps = list[tuple[dict[str, float], int]]
"""Metrics and step number of every step so far."""


class Checkpoint:
    """A file that training writes periodically and resumes from.

    It holds the trained weights and optimizer state after a step, and the metrics logged up to it.
    Only rank 0 reads and writes it; it sends the content to the other ranks.
    """

    def __init__(self, file: Path, identity: str, seconds: float) -> None:
        """A file with another `identity`, or a damaged one, is ignored.

        Written every `seconds`, less often if that would cost more than 5 % of the time.
        """
        self.file, self.identity, self.seconds = file, identity, seconds
        self.written, self.taken = time.monotonic(), 0.0  # Time of the last write, its duration.

    def restore(self, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer) -> Steps:
        """Load weights and optimizer state; return the steps before the checkpoint.

        Without a usable file, change nothing and return no steps. Collective: call on every rank.
        """
        tensors, steps = self._read(parameters) if distributed.rank() == 0 else ({}, [])
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
        interval = max(self.seconds, self.taken / _MAX_TIME_SHARE)
        due = started - self.written >= interval
        if any(isinstance(parameter, DTensor) for parameter in parameters.values()):
            due = distributed.broadcast_object(due)  # Gathering needs all ranks.
        elif distributed.rank() > 0:
            return
        if due:
            self._write(parameters, optimizer, steps)
            self.written = time.monotonic()
            self.taken = self.written - started

    def remove(self) -> None:
        """Delete the file if it exists."""
        self.file.unlink(missing_ok=True)

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
        except (OSError, SafetensorError):
            self.remove()  # Free the space: the stage's result needs it.

    def _read(self, parameters: Mapping[str, nn.Parameter]) -> tuple[dict[str, Tensor], Steps]:
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
