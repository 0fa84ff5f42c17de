"""The classification sets of the O-LoRA benchmark (Wang 2023, arXiv 2310.14152).

Layout: `<root>/instruction_config.json` (instructions by type of task) and
`<root>/<type>/<set>/{train,test,labels}.json` with rows `{"label", "sentence"}`.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from agcl.errors import InputError
from agcl.tasks import records
from agcl.tasks.task import TEST, TRAIN, Row, Task

INSTRUCTIONS, LABELS = "instruction_config.json", "labels.json"
NO_LABEL = "-"
"""MNLI and SNLI's label for rows on which annotators disagreed; such a row has no answer."""


def folders(root: Path) -> dict[str, Path]:
    """The folder of every set, by name. Raises `InputError` if there is none."""
    if not (root / INSTRUCTIONS).is_file():
        raise InputError(f"tasks.path: no {INSTRUCTIONS} in {root}")
    found = {file.parent.name: file.parent for file in sorted(root.glob(f"*/*/{LABELS}"))}
    if not found:
        raise InputError(f"tasks.path: no <type>/<set>/{LABELS} in {root}")
    return found


def task(name: str, type: str, files: Mapping[str, Path]) -> Task:
    """One set as a task; `files` has the keys `train`, `test`, `labels` and `instructions`."""
    sources = {split: partial(_rows, type, dict(files), split) for split in (TRAIN, TEST)}
    return Task(name, sources, scorer="olora_match")


def _rows(type: str, files: Mapping[str, Path], split: str) -> Iterator[Row]:
    labels = records.read_json(files["labels"])
    if not isinstance(labels, list) or not labels or not all(isinstance(x, str) for x in labels):
        raise InputError(f"{files['labels']}: not a JSON list of labels")
    head = f"{_instruction(files['instructions'], type)}Option: {', '.join(labels)} \n"
    for place, record in records.read(files[split], "json"):
        label, sentence = (records.text(record, key, place) for key in ("label", "sentence"))
        if label == NO_LABEL:
            label = ""
        elif label not in labels:
            raise InputError(f"{place}: label {label!r} is not in {files['labels']}")
        prompt = f"{head}{sentence}\nAnswer:" if sentence.strip() else ""
        yield Row(prompt, f" {label}".rstrip())


def _instruction(file: Path, type: str) -> str:
    """The first instruction for a type of task."""
    try:
        instruction = records.read_json(file)[type][0]["instruction"]
    except (KeyError, IndexError, TypeError):
        raise InputError(f"{file}: no instruction for tasks of type {type!r}") from None
    if not isinstance(instruction, str):
        raise InputError(f"{file}: the instruction of type {type!r} is not text")
    return instruction
