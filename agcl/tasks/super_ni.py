"""Super-NaturalInstructions (Wang 2022, arXiv 2204.07705): 15 tasks in two orders.

The tasks and orders are those of SAPT (Zhao 2024, arXiv 2401.08295). Layout:
`<root>/task<number>_<what>/{train,test}.json`, each an object with `Definition`, a list of
instructions, and `Instances`, a list of `{"id", "input", "output": text or list of texts}`.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from agcl.errors import InputError
from agcl.tasks import records
from agcl.tasks.task import TEST, TRAIN, Row, Task

ORDERS = {
    1: tuple("1572 363 1290 181 002 1510 639 1729 073 1590 748 511 591 1687 875".split()),
    2: tuple("748 073 1590 639 1572 1687 591 363 1510 1729 181 511 002 1290 875".split()),
}
"""Task numbers, as folder names write them."""
FILES = {TRAIN: "train.json", TEST: "test.json"}


def folders(root: Path) -> dict[str, Path]:
    """The folder of every task, by name. Raises `InputError` if there is none."""
    found = {f.parent.name: f.parent for f in sorted(root.glob(f"task*_*/{FILES[TRAIN]}"))}
    if not found:
        raise InputError(f"tasks.path: no task<number>_<what>/{FILES[TRAIN]} in {root}")
    return found


def in_order(names: Mapping[str, Path], order: int) -> list[str]:
    """The names of an order's tasks. Raises `InputError` for a task that has no folder."""
    by_number = {name.removeprefix("task").partition("_")[0]: name for name in names}
    for number in ORDERS[order]:
        if number not in by_number:
            raise InputError(
                f"tasks.path: no folder task{number}_<what>, a task of order {order} "
                f"(there are {', '.join(names)})"
            )
    return [by_number[number] for number in ORDERS[order]]


def task(name: str, files: Mapping[str, Path]) -> Task:
    """One task; `files` maps split to file (`FILES`).

    A row trains on its first reference and is scored by the best over all of them. Truncation cuts
    the input and keeps the instruction.
    """
    splits = {split: partial(_rows, file) for split, file in files.items()}
    return Task(name, splits, scorer="rouge_l_stemmed")


def _rows(file: Path) -> Iterator[Row]:
    content = records.read_json(file)
    if not isinstance(content, dict):
        raise InputError(f"{file}: {records.kind(content)}, not a JSON object with Instances")
    instruction = f"{_texts(content, 'Definition', str(file))[0]}\nInput:"
    instances = content.get("Instances")
    if not isinstance(instances, list):
        raise InputError(f"{file}: 'Instances' is {records.kind(instances)}, not a list")
    for number, instance in enumerate(instances, start=1):
        place = f"{file}, instance {number}"
        if not isinstance(instance, dict):
            raise InputError(f"{place}: {records.kind(instance)}, not a JSON object")
        asked = records.text(instance, "input", place).strip()
        first, *others = _texts(instance, "output", place)
        yield Row(
            f"{instruction} {asked}\nOutput:" if asked else "",
            f" {first}".rstrip(),
            references=tuple(other for other in others if other),
            kept=len(instruction),
        )


def _texts(record: Mapping[str, Any], column: str, place: str) -> list[str]:
    """A column that is a text or a list of texts, without white space around them."""
    value = record.get(column)
    if not isinstance(value, list):
        return [records.text(record, column, place).strip()]
    if not value:
        raise InputError(f"{place}: {column!r} is an empty list")
    return [records.text({column: each}, column, place).strip() for each in value]
