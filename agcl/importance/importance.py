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
    """What a task's correct answers relied on, keyed by the unwrapped model's parameter names."""

    entries: Mapping[str, Tensor]
    """Per weight, in its shape: unscaled, signed mean of the top-K relevances over samples. Empty
    if only moments were collected."""
    moments: Mapping[str, Tensor] = field(default_factory=dict)
    """Per weight, (in, in): second moment of the layer's inputs, normalized to length 1 or raw,
    summed over tokens with weights of mean 1. Empty if not collected."""
    header: Mapping[str, Any] = field(default_factory=dict)
    """JSON: the settings it was made with (estimator, rules, top_k, ...) and the row counts."""

    def save(self, file: Path | str) -> None:
        """Write the file atomically: entries in bfloat16, moments in float32."""
        tensors = {_ENTRIES + k: v.to("cpu", torch.bfloat16) for k, v in self.entries.items()}
        tensors |= {_MOMENTS + k: v.to("cpu", torch.float32) for k, v in self.moments.items()}
        tensor_file.write(Path(file), tensors, _KIND, self.header)

    @classmethod
    def load(cls, file: Path | str, *, verify: bool = True) -> "Importance":
        """Open lazily: tensors are read on access and not cached.

        Raises `InputError` naming the file if it is not an importance file or, with `verify`, if
        its checksum is wrong.
        """
        file = Path(file)
        stored, header = tensor_file.open_file(file, _KIND)
        with stored:
            keys = sorted(stored.keys())
        if verify:
            tensor_file.verify(file, _KIND)
        return cls(_Stored(file, _ENTRIES, keys), _Stored(file, _MOMENTS, keys), header)

    @property
    def weights(self) -> list[str]:
        """Names of the weights it covers."""
        return list(self.entries or self.moments)

    def is_zero(self) -> bool:
        """Whether all values are zero."""
        return not any(bool(tensor.any()) for tensor in (self.entries or self.moments).values())

    def check_finite(self) -> None:
        """Raise `ValueError` naming the first tensor with a NaN or infinite value."""
        for name, tensor in [*self.entries.items(), *self.moments.items()]:
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"importance of {name} is not finite")


class _Stored(Mapping[str, Tensor]):
    """The tensors in a file whose keys start with a prefix."""

    def __init__(self, file: Path, prefix: str, keys: list[str]) -> None:
        self.file = file
        self.key_by_name = {k.removeprefix(prefix): k for k in keys if k.startswith(prefix)}

    def __getitem__(self, name: str) -> Tensor:
        key = self.key_by_name[name]
        # Reopened for each tensor: while a file is open, everything read from it stays in memory.
        stored, _ = tensor_file.open_file(self.file, _KIND)
        with stored:
            return cast(Tensor, stored.get_tensor(key))

    def __iter__(self) -> Iterator[str]:
        return iter(self.key_by_name)

    def __len__(self) -> int:
        return len(self.key_by_name)


def check_file(
    file: Path, linears: Mapping[str, nn.Module], *, entries: bool = True, moments: bool = False
) -> None:
    """Check that a file is intact, fits a model with these linear layers, and holds the parts
    (`entries`, `moments`) that are requested.

    Reads one tensor at a time; each file's checksum is verified once per process. Raises
    `InputError` naming the file and the first weight that is missing or differs in shape.
    """
    stored, _ = tensor_file.open_file(file, _KIND)
    with stored:
        shapes = {key: tuple(stored.get_slice(key).get_shape()) for key in stored.keys()}  # noqa: SIM118
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
    status = file.stat()
    _verify_once(file, status.st_size, status.st_mtime_ns)


def _shape(layer: nn.Module, part: str) -> tuple[int, ...]:
    if part == _ENTRIES:
        return tuple(cast(Tensor, layer.weight).shape)
    return (weight_of(layer).shape[1],) * 2


@cache
def _verify_once(file: Path, size: int, modified_ns: int) -> None:
    tensor_file.verify(file, _KIND)
