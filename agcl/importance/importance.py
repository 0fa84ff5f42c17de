"""The importance artifact: relevance of every weight for one task, and its file.

The file is safetensors with a checksum over names, shapes, values and header. A flipped bit of a
weight's relevance is a number like any other, so nothing else could tell.
"""

import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from agcl.errors import InputError

_HEADER, _CHECKSUM = "agcl_importance", "agcl_crc32"
_ENTRIES, _MOMENTS = "entries/", "moments/"


@dataclass(frozen=True)
class Importance:
    """What one task's right answers used. Keys are parameter names of the unwrapped model."""

    entries: Mapping[str, Tensor]
    """In the weight's own shape: unscaled mean of the top-K relevances over samples; signed."""
    moments: Mapping[str, Tensor] = field(default_factory=dict)
    """(in, in) a weight: second moment of the layer's inputs, summed over tokens with weights of
    mean 1. Empty where it was not collected."""
    header: Mapping[str, Any] = field(default_factory=dict)
    """How it was made: rules, top_k, number of samples; JSON."""

    def save(self, file: Path) -> None:
        """Write aside, then rename: entries in bfloat16, moments in float32."""
        tensors = {_ENTRIES + k: v.to("cpu", torch.bfloat16) for k, v in self.entries.items()}
        tensors |= {_MOMENTS + k: v.to("cpu", torch.float32) for k, v in self.moments.items()}
        tensors = {k: tensors[k].contiguous() for k in sorted(tensors)}
        header = json.dumps(dict(self.header))
        metadata = {_HEADER: header, _CHECKSUM: _checksum(header, tensors.items())}
        aside = file.with_name(file.name + ".part")
        save_file(tensors, aside, metadata=metadata)
        aside.replace(file)

    @classmethod
    def load(cls, file: Path) -> "Importance":
        """Read a file of `save`. Raises `InputError` naming the file if it is none, or damaged."""
        with _open(file) as stored:
            header = _header(file, stored)
            tensors = {key: stored.get_tensor(key) for key in sorted(stored.keys())}
            _verify(file, stored, tensors.items())
        return cls(
            {k.removeprefix(_ENTRIES): v for k, v in tensors.items() if k.startswith(_ENTRIES)},
            {k.removeprefix(_MOMENTS): v for k, v in tensors.items() if k.startswith(_MOMENTS)},
            header,
        )

    def is_zero(self) -> bool:
        """Whether no entry carries any relevance."""
        return not any(bool(entry.any()) for entry in self.entries.values())

    def check_finite(self) -> None:
        """Raise `ValueError` naming the first tensor with a NaN or an infinity."""
        for name, tensor in [*self.entries.items(), *self.moments.items()]:
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"importance of {name} is not finite")


def check_file(file: Path, linears: Mapping[str, nn.Module]) -> None:
    """Check that a file is undamaged and belongs to a model with these linear layers.

    Reads a tensor at a time, and the values only once a process. Raises `InputError` naming the
    file and the first weight that is missing or differs in shape.
    """
    with _open(file) as stored:
        _header(file, stored)
        shapes = {
            key.removeprefix(_ENTRIES): tuple(stored.get_slice(key).get_shape())
            for key in stored.keys()  # noqa: SIM118
            if key.startswith(_ENTRIES)
        }
    for name in [*linears, *shapes]:
        expected = tuple(cast(Tensor, linears[name].weight).shape) if name in linears else None
        if shapes.get(name) != expected:
            raise InputError(
                f"{file}: importance of another model ({name} is {shapes.get(name) or 'absent'} "
                f"in the file and {expected or 'absent'} in the model)"
            )
    status = file.stat()
    _verify_as_of(file, status.st_size, status.st_mtime_ns)


@cache
def _verify_as_of(file: Path, size: int, changed: int) -> None:
    with _open(file) as stored:
        _verify(file, stored, ((key, stored.get_tensor(key)) for key in sorted(stored.keys())))


def _verify(file: Path, stored: Any, tensors: Iterable[tuple[str, Tensor]]) -> None:
    metadata = stored.metadata()
    if _CHECKSUM not in metadata:
        raise InputError(f"{file}: no checksum (an older version's file?); attribute again")
    if _checksum(metadata[_HEADER], tensors) != metadata[_CHECKSUM]:
        raise InputError(f"{file}: damaged, its content does not fit its checksum")


def _checksum(header: str, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """CRC-32, which finds any damage but a deliberate one; four times as fast as SHA-256."""
    value = zlib.crc32(header.encode())
    for key, tensor in tensors:
        value = zlib.crc32(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, value)
    return f"{value:08x}"


def _open(file: Path) -> Any:
    if not file.is_file():
        raise InputError(f"no importance file {file}")
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: not a readable importance file ({error})") from None


def _header(file: Path, stored: Any) -> dict[str, Any]:
    metadata = stored.metadata() or {}
    if _HEADER not in metadata:
        raise InputError(f"{file}: a safetensors file, but not an importance of agcl")
    try:
        header = json.loads(metadata[_HEADER])
    except ValueError:
        header = None
    if not isinstance(header, dict):
        raise InputError(f"{file}: the header of this importance file is damaged")
    return header
