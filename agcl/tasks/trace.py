"""TRACE (Wang 2023, arXiv 2310.06762): eight tasks, each with its own scorer, in two orders.

Layout: `<root>/<task>/{train,eval,test}.json`, each a list of `{"prompt", "answer"}`.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from agcl.tasks import records
from agcl.tasks.task import TEST, TRAIN, VALIDATION, Row, Task

SCORERS = {
    "C-STANCE": "exact_match",
    "FOMC": "exact_match",
    "MeetingBank": "rouge_l",
    "Py150": "edit_similarity",
    "ScienceQA": "first_character",
    "NumGLUE-cm": "exact_match",
    "NumGLUE-ds": "exact_match",
    "20Minuten": "sari",
}
ORDERS = {
    1: tuple(SCORERS),
    2: tuple("NumGLUE-cm NumGLUE-ds FOMC 20Minuten C-STANCE Py150 MeetingBank ScienceQA".split()),
}
FILES = {TRAIN: "train.json", TEST: "test.json", VALIDATION: "eval.json"}


def task(name: str, files: Mapping[str, Path]) -> Task:
    """One of TRACE's tasks; `files` maps split to file (`FILES`)."""
    splits = {split: partial(_rows, file) for split, file in files.items()}
    return Task(name, splits, scorer=SCORERS[name])


def _rows(file: Path) -> Iterator[Row]:
    for place, record in records.read(file, "json"):
        prompt, answer = (records.text(record, key, place) for key in ("prompt", "answer"))
        separated = prompt[-1:].isspace() or answer[:1].isspace()
        yield Row(prompt, answer if separated else f" {answer}")
