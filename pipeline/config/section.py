"""The base of all config sections, and types that they share."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from pipeline.secrets import has_credentials
from pipeline.storage import Storage, storage_at

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""Pattern of names that are folders."""
_LONGEST = 4000
"""Bytes of a path; below the limit of common systems."""


def absolute(path: Path) -> Path:
    """The path from the current folder or `~`. Refuses one that no system could open.

    Made absolute when the config is read: trials run in other folders, and the `config.yaml` of a
    run works from anywhere.
    """
    whole = os.fspath(path)
    if "\0" in whole:
        raise PydanticCustomError("path", "a path cannot contain NUL")
    if len(whole.encode()) > _LONGEST or any(len(p.encode()) > 255 for p in whole.split("/")):
        raise PydanticCustomError("path", "a name in this path is too long")
    try:
        return path.expanduser().absolute()
    except RuntimeError:
        raise PydanticCustomError("path", "there is no such home folder") from None


Precision = Literal["float32", "bfloat16"]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1, le=2**31 - 1)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Place = Annotated[Path, AfterValidator(absolute)]
"""A path of the user's, made absolute; `~` is the home folder."""


def _storage(value: Any) -> Storage:
    if isinstance(value, Storage):
        return value
    if not isinstance(value, str | Path):
        raise PydanticCustomError("path_type", "must be a folder or the URI of an object store")
    if isinstance(value, Path) or "://" not in value:
        return storage_at(absolute(Path(value)))
    absolute(Path(value))
    if has_credentials(value):
        raise PydanticCustomError(
            "uri", "credentials do not go into the URI but into the environment (AWS_PROFILE, ...)"
        )
    address, question, query = value.partition("?")
    return storage_at(address.rstrip("/") + question + query)


StoragePlace = Annotated[Storage, PlainValidator(_storage), PlainSerializer(str, return_type=str)]
"""A folder, or the URI of an object store."""


class Section(BaseModel):
    """Base of all sections."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _no_bool_for_a_number(cls, values: Any) -> Any:
        for key, value in values.items() if isinstance(values, dict) else ():
            field = cls.model_fields.get(key)
            allowed = (field.annotation, *get_args(field.annotation)) if field else (bool,)
            if isinstance(value, bool) and bool not in allowed:
                raise ValueError(f"{key}: cannot be true or false")
        return values
