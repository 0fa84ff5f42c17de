"""Task formats and their encoding. A format is a module with a function that returns a `Task`."""

from agcl.tasks.encoding import SCHEMA, Encoded, EncodedRows, Rows, encode, sample
from agcl.tasks.task import (
    TEST,
    TRAIN,
    VALIDATION,
    Conversation,
    Row,
    RowSource,
    Task,
    check_names,
    check_rows,
    is_empty,
)

__all__ = [
    "SCHEMA",
    "TEST",
    "TRAIN",
    "VALIDATION",
    "Conversation",
    "Encoded",
    "EncodedRows",
    "Row",
    "RowSource",
    "Rows",
    "Task",
    "check_names",
    "check_rows",
    "encode",
    "is_empty",
    "sample",
]
