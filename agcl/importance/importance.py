"""The importance artifact: relevance of every weight for one task, and its file."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from agcl.errors import InputError
from agcl.files import tensor_file
from agcl.lrp import weight_of

_KIND = "importance"
_ENTRIES, _MOMENTS = "entries/", "moments/"


@dataclass(frozen=True)
class Importance:
    """What one task's right answers used. Keys are parameter names of the unwrapped model."""

    entries: Mapping[str, Tensor]
    """In the weight's own shape: unscaled mean of the top-K relevances over samples; signed. Empty
    where only moments were collected."""
    moments: Mapping[str, Tensor] = field(default_factory=dict)
    """(in, in) a weight: second moment of the layer's inputs, scaled to length 1 or as they are,
    summed over tokens with weights of mean 1. Empty where it was not collected."""
    header: Mapping[str, Any] = field(default_factory=dict)
    """How it was made: rules, top_k, number of samples; JSON."""

    def save(self, file: Path) -> None:
        """Write the file, whole or not at all: entries in bfloat16, moments in float32."""
        tensors = {_ENTRIES + k: v.to("cpu", torch.bfloat16) for k, v in self.entries.items()}
        tensors |= {_MOMENTS + k: v.to("cpu", torch.float32) for k, v in self.moments.items()}
        tensor_file.write(file, tensors, _KIND, self.header)

    @classmethod
    def load(cls, file: Path, *, verify: bool = True) -> "Importance":
        """A file of `save`; a tensor is read when it is looked at, and only for as long, so that
        many past tasks take no more memory than few. Raises `InputError` naming the file if it is
        none, or, unless it was verified before, damaged.
        """
        stored, header = tensor_file.open_file(file, _KIND)
        with stored:
            if verify:
                tensor_file.verify(file, stored, _KIND)
            keys = sorted(stored.keys())
        return cls(_Stored(file, _ENTRIES, keys), _Stored(file, _MOMENTS, keys), header)

    @property
    def weights(self) -> list[str]:
        """Names of the weights that it tells of."""
        return list(self.entries or self.moments)

    def is_zero(self) -> bool:
        """Whether no weight carries any relevance."""
        return not any(bool(found.any()) for found in (self.entries or self.moments).values())

    def check_finite(self) -> None:
        """Raise `ValueError` naming the first tensor with a NaN or an infinity."""
        for name, tensor in [*self.entries.items(), *self.moments.items()]:
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"importance of {name} is not finite")


class _Stored(Mapping[str, Tensor]):
    """The tensors of a file under a prefix.

    It is opened anew for each: of an open file, whatever was looked at stays in memory.
    """

    def __init__(self, file: Path, prefix: str, keys: list[str]) -> None:
        self.file = file
        self.keys_of = {k.removeprefix(prefix): k for k in keys if k.startswith(prefix)}

    def __getitem__(self, name: str) -> Tensor:
        key = self.keys_of[name]
        stored, _ = tensor_file.open_file(self.file, _KIND)
        with stored:
            return cast(Tensor, stored.get_tensor(key))

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys_of)

    def __len__(self) -> int:
        return len(self.keys_of)


def check_file(
    file: Path, linears: Mapping[str, nn.Module], *, entries: bool = True, moments: bool = False
) -> None:
    """Check that a file is undamaged, belongs to a model with these linear layers, and holds
    `entries` and `moments` as far as they are asked for.

    Reads a tensor at a time, and the values only once a process. Raises `InputError` naming the
    file and the first weight that is missing or differs in shape.
    """
    stored, _ = tensor_file.open_file(file, _KIND)
    with stored:
        shapes = {key: tuple(stored.get_slice(key).get_shape()) for key in stored.keys()}  # noqa: SIM118
    found = [part for part in (_ENTRIES, _MOMENTS) if any(key.startswith(part) for key in shapes)]
    if entries and found == [_MOMENTS]:
        raise InputError(f"{file}: no relevance of single weights, which gate and penalty need")
    if moments and found == [_ENTRIES]:
        raise InputError(f"{file}: no moments of inputs, which a projection needs")
    asked = [part for part, is_asked in ((_ENTRIES, entries), (_MOMENTS, moments)) if is_asked]
    for part in asked or found[:1] or [_ENTRIES]:
        in_file = {k.removeprefix(part): shape for k, shape in shapes.items() if k.startswith(part)}
        for name in [*linears, *in_file]:
            expected = _shape(linears[name], part) if name in linears else None
            if in_file.get(name) != expected:
                raise InputError(
                    f"{file}: importance of another model ({part}{name} is "
                    f"{in_file.get(name) or 'absent'} in the file and {expected or 'absent'} in "
                    "the model)"
                )
    status = file.stat()
    _verify_as_of(file, status.st_size, status.st_mtime_ns)


def _shape(layer: nn.Module, part: str) -> tuple[int, ...]:
    if part == _ENTRIES:
        return tuple(cast(Tensor, layer.weight).shape)
    return (weight_of(layer).shape[1],) * 2


@cache
def _verify_as_of(file: Path, size: int, changed: int) -> None:
    stored, _ = tensor_file.open_file(file, _KIND)
    with stored:
        tensor_file.verify(file, stored, _KIND)
