"""Concept-1K (Zheng et al. 2024, arXiv 2402.08526): 16,653 facts about 1,023 concepts, ten tasks.

`dataset.txt` is a list of five-line blocks. Tasks match the reference code: concepts in order of
first appearance, shuffled by Python's `random` with seed 1; 105 concepts in the first task, 102 in
the others. Like the reference parser, ours drops the last block.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

from agcl.errors import InputError
from agcl.tasks import records
from agcl.tasks.task import TEST, TRAIN, Row, Task

FIRST_TASK_CONCEPTS, TASK_CONCEPTS, NUM_TASKS = 105, 102, 10


@dataclass(frozen=True, slots=True)
class Fact:
    """One block of the file."""

    concept: str
    question: str
    paraphrase: str
    answer: str


def task(index: int, file: Path, *, concepts_per_task: int | None = None) -> Task:
    """The task with that index, from 0, limited to its first `concepts_per_task` concepts.

    `file` is the benchmark's `dataset.txt`. Trains on each fact's first question; evaluation sets
    are `memorization` (that question) and `generalization` (the second question).
    """
    concepts = tuple(task_concepts(read(file))[index][:concepts_per_task])
    return Task(
        name=f"concepts-{index}",
        splits={split: partial(_rows, file, concepts, split) for split in (TRAIN, TEST)},
        scored={"memorization": TRAIN, "generalization": TEST},
        memorized=True,
    )


def task_concepts(facts: tuple[Fact, ...]) -> list[list[str]]:
    """The concepts of every task, in the reference code's order."""
    concepts = list(dict.fromkeys(fact.concept for fact in facts))
    random.Random(1).shuffle(concepts)
    starts = [0, *(FIRST_TASK_CONCEPTS + i * TASK_CONCEPTS for i in range(NUM_TASKS - 1))]
    return [concepts[a:b] for a, b in zip(starts, [*starts[1:], None], strict=True)]


def _rows(file: Path, concepts: tuple[str, ...], split: str) -> Iterator[Row]:
    wanted = set(concepts)
    for fact in read(file):
        if fact.concept in wanted:
            question = fact.question if split == TRAIN else fact.paraphrase
            prompt = f"Question: {question}\n Short Answer:" if question else ""
            yield Row(prompt, f" {fact.answer}", fact=f"{fact.question}\0{fact.answer}")


def read(file: Path) -> tuple[Fact, ...]:
    """Parse `dataset.txt` (3.4 MB). Raises `InputError` naming the line of a malformed block."""
    return _parsed(file, records.read_text(file))


@lru_cache(maxsize=1)  # By content: every task and split of a plan reads the same file.
def _parsed(file: Path, content: str) -> tuple[Fact, ...]:
    lines = content.splitlines()
    starts = [n for n, line in enumerate(lines) if line.startswith("(") and line.endswith(")")]
    facts = [_fact(file, lines, start) for start in starts[:-1]]
    if not facts:
        raise InputError(f"{file}: no (Concept, Relation, Object) block found")
    return tuple(facts)


def _fact(file: Path, lines: list[str], start: int) -> Fact:
    header = lines[start][1:-1].split(", ", 2)
    body = [line.partition(": ") for line in lines[start + 1 : start + 5]]
    labels = [label for label, _, _ in body]
    if len(header) < 3 or labels not in (["Q1", "A1", "Q2", "Q2"], ["Q1", "A1", "Q2", "A2"]):
        raise InputError(
            f"{file}, line {start + 1}: expected (Concept, Relation, Object), then Q1, A1, Q2 and "
            f"its answer; found {labels}"
        )
    question, answer, paraphrase, second_answer = (text.strip() for _, _, text in body)
    if answer != second_answer:
        raise InputError(f"{file}, line {start + 1}: the two answers differ")
    return Fact(header[0], question, paraphrase, answer)
