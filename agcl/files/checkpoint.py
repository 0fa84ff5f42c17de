"""Checkpoints inside a task, so that training that is cut off goes on where it was."""

import json
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

_KIND = "checkpoint"
_WEIGHT, _STATE = "weight/", "state/"
_LARGEST_SHARE = 1 / 20
"""Of the time that goes into writing checkpoints."""

Steps = list[tuple[dict[str, float], int]]
"""Metrics and number of every step so far."""


def _nothing(file: Path) -> None:
    pass


class Checkpoint:
    """A file that training writes now and then and goes on from.

    It holds the trained weights and the optimizer's state after a step, and what was logged up to
    it. The first worker writes it and sends it to the others, who need not see the file.
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
        """`identity` says what is trained: a file with another identity, or a damaged one, is
        ignored.

        Written every `seconds`, less often if that would cost more than 5 % of the time. The three
        functions keep a copy of the file elsewhere, for when this machine is lost.
        """
        self.file, self.identity, self.seconds = file, identity, seconds
        self.download, self.upload, self.delete = download, upload, delete
        self.written, self.taken = time.monotonic(), 0.0

    def restore(self, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer) -> Steps:
        """Set weights and optimizer state to those of the file; gives the steps before it.

        Gives none, and changes nothing, where there is no such file. Called by every worker.
        """
        tensors, steps = self._read(parameters) if distributed.rank() == 0 else ({}, [])
        steps, layout = distributed.broadcast_object(
            (steps, {key: (tensor.shape, tensor.dtype) for key, tensor in tensors.items()})
        )
        for key, (shape, dtype) in layout.items():
            kind, name, entry = _parts(key)
            parameter = parameters[name]
            tensor = tensors.get(key, torch.empty(shape, dtype=dtype)).to(parameter.device)
            distributed.broadcast(tensor, 0)
            if tensor.shape == parameter.shape:
                tensor = sharding.placed_like(tensor, parameter)
            if kind == _WEIGHT:
                parameter.data.copy_(tensor)
            else:
                optimizer.state[parameter][entry] = tensor
        return steps

    def write_if_due(
        self, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer, steps: Steps
    ) -> None:
        """Write the file, where enough time has passed and there is room for it.

        Called by every worker.
        """
        started = time.monotonic()
        due = started - self.written >= max(self.seconds, self.taken / _LARGEST_SHARE)
        if any(isinstance(parameter, DTensor) for parameter in parameters.values()):
            due = distributed.broadcast_object(due)  # Gathering takes all workers.
        elif distributed.rank() > 0:
            return
        if due:
            self._write(parameters, optimizer, steps)
            self.written = time.monotonic()
            self.taken = self.written - started

    def remove(self) -> None:
        """Remove the file, if there is one, and its copy elsewhere."""
        self.file.unlink(missing_ok=True)
        self.delete(self.file)

    def _write(
        self, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer, steps: Steps
    ) -> None:
        held: dict[str, Tensor] = {_WEIGHT + name: p for name, p in parameters.items()}
        for name, parameter in parameters.items():
            for entry, value in optimizer.state.get(parameter, {}).items():
                held[f"{_STATE}{entry}/{name}"] = value
        tensors = dict(sharding.on_first_worker(held.items()))
        if distributed.rank() > 0:
            return
        # As a tensor: the header's length is limited.
        tensors["steps"] = torch.frombuffer(
            bytearray(json.dumps(steps).encode()), dtype=torch.uint8
        )
        try:
            tensor_file.write(self.file, tensors, _KIND, {"identity": self.identity})
            self.upload(self.file)
        except (OSError, SafetensorError):
            self.remove()  # The room is needed for the result.

    def _read(self, parameters: Mapping[str, nn.Parameter]) -> tuple[dict[str, Tensor], Steps]:
        if not self.file.exists():
            self.download(self.file)
        try:
            stored, header = tensor_file.open_file(self.file, _KIND)
            tensor_file.verify(self.file, stored, _KIND)
        except InputError:
            return {}, []
        with stored:
            if header.get("identity") != self.identity:
                return {}, []
            tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
        steps: Steps = [tuple(each) for each in json.loads(bytes(tensors.pop("steps").numpy()))]
        names = {_parts(key)[1] for key in tensors}
        return (tensors, steps) if names == set(parameters) else ({}, [])


def _parts(key: str) -> tuple[str, str, str]:
    """Kind, parameter name and state entry of a key."""
    if key.startswith(_WEIGHT):
        return _WEIGHT, key.removeprefix(_WEIGHT), ""
    entry, _, name = key.removeprefix(_STATE).partition("/")
    return _STATE, name, entry
