"""Task formats and their encoding. A format is one module with a function returning `Task`s."""

from agcl.tasks.encoding import SCHEMA, Encoded, EncodedRows, MixedRows, Rows, encode, sample
from agcl.tasks.task import TEST, TRAIN, Row, RowSource, Task, check_names, check_rows

__all__ = [
    "SCHEMA",
    "TEST",
    "TRAIN",
    "Encoded",
    "EncodedRows",
    "MixedRows",
    "Row",
    "RowSource",
    "Rows",
    "Task",
    "check_names",
    "check_rows",
    "encode",
    "sample",
]
