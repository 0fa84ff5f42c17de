"""The importance artifact: relevance of every weight for one task, and its file."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from agcl.errors import InputError
from agcl.files import tensor_file
from agcl.importance.moment import Moment, orthonormal
from agcl.lrp import input_width

_KIND = "importance"
_ENTRIES, _DIRECTIONS, _ENERGIES = "entries/", "directions/", "energies/"
_INPUTS, _TRACES = "inputs", "traces"
_MOMENTS = "moments/"
"""Prefix of whole moments, in files of agcl 0.8 and earlier."""


@dataclass(frozen=True)
class Importance:
    """What a task's correct answers relied on, keyed by the unwrapped model's parameter names."""

    entries: Mapping[str, Tensor]
    """Per weight, in its shape: unscaled, signed mean of the top-K relevances over samples. Empty
    if only moments were collected."""
    moments: Mapping[str, Moment] = field(default_factory=dict)
    """Per input: second moment of the vectors that its layers read, normalized to length 1 or raw,
    summed over tokens with weights of mean 1. Empty if not collected."""
    header: Mapping[str, Any] = field(default_factory=dict)
    """JSON: the settings it was made with (estimator, rules, top_k, ...) and the row counts."""
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Per weight, the key of its layer's input in `moments`: the first weight that reads it. If
    empty, every weight has its own."""

    def save(self, file: Path | str) -> None:
        """Write the file atomically: entries in bfloat16, directions in float16."""
        tensors = {_ENTRIES + k: v.to("cpu", torch.bfloat16) for k, v in self.entries.items()}
        for name, moment in self.moments.items():
            tensors[_DIRECTIONS + name] = moment.directions.to("cpu", torch.float16)
            tensors[_ENERGIES + name] = moment.energies.cpu()
        traces = {name: moment.trace for name, moment in self.moments.items()}
        parts = {_INPUTS: dict(self.inputs), _TRACES: traces} if traces else {}
        tensor_file.write(Path(file), tensors, _KIND, {**self.header, **parts})

    @classmethod
    def load(
        cls, file: Path | str, *, verify: bool = True, device: torch.device | str = "cpu"
    ) -> "Importance":
        """Open lazily: tensors are read on access and not cached, moments onto `device`.

        Raises `InputError` naming the file if it is not an importance file or, with `verify`, if
        its checksum is wrong.
        """
        file = Path(file)
        stored, header = tensor_file.open_file(file, _KIND)
        with stored:
            keys = sorted(stored.keys())
        if verify:
            tensor_file.verify(file, _KIND)
        _refuse_old(file, keys)
        traces, inputs = header.pop(_TRACES, {}), header.pop(_INPUTS, {})
        moments = _Moments(file, keys, traces, device)
        return cls(_Entries(file, keys), moments, header, inputs)

    @property
    def weights(self) -> list[str]:
        """Names of the weights it covers."""
        return list(self.entries or self.inputs or self.moments)

    def input_of(self, weight: str) -> str:
        """The key in `moments` of what a weight's layer reads."""
        return self.inputs.get(weight, weight)

    def is_zero(self) -> bool:
        """Whether all values are zero."""
        if self.entries:
            return not any(bool(tensor.any()) for tensor in self.entries.values())
        return not any(moment.trace for moment in self.moments.values())

    def check_finite(self) -> None:
        """Raise `ValueError` naming the first tensor with a NaN or infinite value."""
        energies = [(name, moment.energies) for name, moment in self.moments.items()]
        for name, tensor in [*self.entries.items(), *energies]:
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"importance of {name} is not finite")


T = TypeVar("T")


class _Stored(Mapping[str, T]):
    """What a file holds per name, read on access."""

    def __init__(self, file: Path, prefix: str, keys: list[str]) -> None:
        self.file = file
        self.names = [k.removeprefix(prefix) for k in keys if k.startswith(prefix)]

    def _read(self, key: str) -> Tensor:
        # Reopened for each tensor: while a file is open, everything read from it stays in memory.
        stored, _ = tensor_file.open_file(self.file, _KIND)
        with stored:
            return cast(Tensor, stored.get_tensor(key))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class _Entries(_Stored[Tensor]):
    def __init__(self, file: Path, keys: list[str]) -> None:
        super().__init__(file, _ENTRIES, keys)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        return self._read(_ENTRIES + name)


class _Moments(_Stored[Moment]):
    def __init__(
        self,
        file: Path,
        keys: list[str],
        traces: Mapping[str, float],
        device: torch.device | str,
    ) -> None:
        super().__init__(file, _DIRECTIONS, keys)
        self.traces, self.device = traces, device

    def __getitem__(self, name: str) -> Moment:
        # Orthonormalize on the device: for wide inputs this takes minutes on a CPU.
        directions = orthonormal(self._read(_DIRECTIONS + name).to(self.device))
        return Moment(directions, self._read(_ENERGIES + name).to(self.device), self.traces[name])


def _refuse_old(file: Path, keys: Iterable[str]) -> None:
    if any(key.startswith(_MOMENTS) for key in keys):
        raise InputError(f"{file}: written by agcl 0.8 or earlier; measure the importance again")


def check_file(
    file: Path,
    linears: Mapping[str, nn.Module],
    *,
    entries: bool = True,
    moments: bool = False,
    measured_with: Mapping[str, Any] | None = None,
) -> None:
    """Check that a file is intact, fits a model with these linear layers, holds the parts
    (`entries`, `moments`) that are requested, and has no other settings in its header than those
    of `measured_with`.

    Reads one tensor at a time; each file's checksum is verified once per process. Raises
    `InputError` naming the file and the first weight that is missing or differs in shape, or the
    first setting that differs.
    """
    stored, header = tensor_file.open_file(file, _KIND)
    status = file.stat()
    _verify_once(file, status.st_size, status.st_mtime_ns)
    with stored:
        shapes = {key: tuple(stored.get_slice(key).get_shape()) for key in stored.keys()}  # noqa: SIM118
    _refuse_old(file, shapes)
    for key, value in (measured_with or {}).items():
        if header.get(key, value) != value:
            raise InputError(
                f"{file}: measured with {key}={header[key]!r}, the config has {value!r}"
            )
    inputs = header.get(_INPUTS) or {name: name for name in header.get(_TRACES, {})}
    for name, key in inputs.items():
        shapes[_MOMENTS + name] = shapes[_DIRECTIONS + key][:1]
    parts = (
        (_ENTRIES, entries, "relevance of single weights, which gate and penalty need"),
        (_MOMENTS, moments, "input moments, which a projection needs"),
    )
    for part, requested, content in parts:
        in_file = {k.removeprefix(part): shape for k, shape in shapes.items() if k.startswith(part)}
        if requested and not in_file:
            raise InputError(f"{file}: no {content}")
        is_wanted = requested or not (entries or moments)
        for name in [*linears, *in_file] if in_file and is_wanted else ():
            expected = _shape(linears[name], part) if name in linears else None
            if in_file.get(name) != expected:
                raise InputError(
                    f"{file}: importance of another model ({part}{name}: "
                    f"{in_file.get(name) or 'absent'} in the file, {expected or 'absent'} in the "
                    "model)"
                )


def _shape(layer: nn.Module, part: str) -> tuple[int, ...]:
    if part == _ENTRIES:
        return tuple(cast(Tensor, layer.weight).shape)
    return (input_width(layer),)


@cache
def _verify_once(file: Path, size: int, modified_ns: int) -> None:
    tensor_file.verify(file, _KIND)
