"""Tensor files, written atomically: safetensors with a header and a checksum.

Without the checksum a flipped bit would go unnoticed: it yields another valid number.
"""

import json
import os
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, uint8

from agcl.errors import InputError

_CHECKSUM = "agcl_crc32"


def write(file: Path, tensors: Mapping[str, Tensor], kind: str, header: Mapping[str, Any]) -> None:
    """Write CPU tensors to a temporary file, flush it to disk, then rename it.

    `kind` names the kind of file in a word or two; `header` must be JSON. An error leaves no file.
    """
    tensors = {key: tensors[key].contiguous() for key in sorted(tensors)}
    text = json.dumps(dict(header))
    metadata = {_key(kind): text, _CHECKSUM: _checksum(text, tensors.items())}
    temporary = file.with_name(file.name + ".part")
    try:
        save_file(tensors, temporary, metadata=metadata)
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def open_file(file: Path, kind: str) -> tuple[Any, dict[str, Any]]:
    """Open a safetensors file; return it and its header. Values are not checked, see `verify`.

    Raises `InputError` naming the file if it is missing, unreadable or of another kind.
    """
    if not file.is_file():
        raise InputError(f"no {kind} file {file}")
    try:
        stored: Any = safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: not a readable {kind} file ({error})") from None
    metadata = stored.metadata() or {}
    if _key(kind) not in metadata:
        raise InputError(f"{file}: a safetensors file, but not an agcl {kind} file")
    try:
        header = json.loads(metadata[_key(kind)])
    except ValueError:
        header = None
    if not isinstance(header, dict):
        raise InputError(f"{file}: the header of this {kind} file is damaged")
    return stored, header


def verify(file: Path, kind: str) -> None:
    """Compare header and values with the checksum, one tensor at a time. Raises `InputError`."""
    stored, _ = open_file(file, kind)
    with stored:
        metadata = stored.metadata()
        if _CHECKSUM not in metadata:
            raise InputError(f"{file}: no checksum (written by an older version?); create it again")
        tensors = ((key, stored.get_tensor(key)) for key in sorted(stored.keys()))
        if _checksum(metadata[_key(kind)], tensors) != metadata[_CHECKSUM]:
            raise InputError(f"{file}: damaged, its content does not match its checksum")


def _key(kind: str) -> str:
    return f"agcl_{kind}"


def _checksum(header: str, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """CRC-32: detects accidental damage, four times as fast as SHA-256."""
    value = zlib.crc32(header.encode())
    for key, tensor in tensors:
        value = zlib.crc32(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        value = zlib.crc32(tensor.reshape(-1).view(uint8).numpy().data, value)
    return f"{value:08x}"
