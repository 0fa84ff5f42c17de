"""Which rows are used for training, testing and validation."""

import pytest

from agcl.tasks import TEST, TRAIN, VALIDATION, Row, Task, concept1k, facts
from agcl.tasks.selection import position, select


def row(i):
    return Row(f"prompt {i}", f"answer {i % 3}")


def task(numbers=range(1000), **options):
    train, test = [row(i) for i in numbers], [row(i) for i in range(5000, 5400)]
    return Task("t", {TRAIN: lambda: iter(train), TEST: lambda: iter(test)}, **options)


def chosen(task, split=TRAIN, **options):
    settings = {"train_rows": None, "test_rows": None, "validation": 0.0, "seed": 0, **options}
    found = select(task, **settings)
    return list(found.splits[split]())


def test_without_limits_nothing_changes():
    assert chosen(task()) == [row(i) for i in range(1000)]


def test_validation_rows_are_excluded_from_training_and_none_is_lost():
    train, held = (chosen(task(), split, validation=0.3) for split in (TRAIN, VALIDATION))
    assert not set(train) & set(held)
    assert sorted([*train, *held], key=str) == sorted(map(row, range(1000)), key=str)
    assert 240 < len(held) < 360


def test_adding_rows_does_not_move_others_between_splits():
    few = set(chosen(task(range(0, 1000, 2)), VALIDATION, validation=0.3))
    more = set(chosen(task(), VALIDATION, validation=0.3))
    assert few == {each for each in more if each in {row(i) for i in range(0, 1000, 2)}}


def test_another_seed_chooses_other_rows():
    first, second = (chosen(task(), VALIDATION, validation=0.3, seed=seed) for seed in (0, 1))
    assert first != second


def test_validation_is_a_scored_set_and_the_tasks_own_split_comes_first():
    own = task()
    own.splits[VALIDATION] = lambda: iter([row(7000)])
    found = select(own, train_rows=None, test_rows=None, validation=0.1, seed=0)
    assert dict(found.scored) == {TEST: TEST, VALIDATION: VALIDATION}
    assert list(found.splits[VALIDATION]()) == [row(7000)]
    assert len(list(found.splits[TRAIN]())) == 1000
    assert (
        VALIDATION not in select(own, train_rows=None, test_rows=None, validation=0, seed=0).splits
    )


@pytest.mark.parametrize("limit", [1, 10, 999, 5000])
def test_a_limit_keeps_that_many_rows_in_order(limit):
    found = chosen(task(), train_rows=limit)
    assert len(found) == min(limit, 1000)
    numbers = [int(each.prompt.split()[1]) for each in found]
    assert numbers == sorted(numbers)
    if 10 <= limit < 1000:
        assert numbers != list(range(limit))


def test_a_larger_limit_includes_the_rows_of_a_smaller_one():
    assert set(chosen(task(), train_rows=50)) < set(chosen(task(), train_rows=100))


def test_a_limit_after_validation_is_unbiased():
    # With the same seed for both, the remaining rows would all have high positions.
    train = chosen(task(), train_rows=100, validation=0.5)
    assert len(train) == 100
    assert len(chosen(task(), VALIDATION, validation=0.5, test_rows=20)) == 20
    assert len(chosen(task(), TEST, test_rows=20)) == 20


BENCHMARKS = ["facts", "concept1k"]


@pytest.fixture(params=BENCHMARKS)
def facts_task(request, tmp_path):
    """A task that trains on questions and scores paraphrases too."""
    if request.param == "facts":
        return facts.task(0, entities=40, base_entities=3, seed=0)
    blocks = [
        f"(C{i}, Is, T)\nQ1: What is {i}?\nA1: a{i}\nQ2: And {i}?\nQ2: a{i}\n" for i in range(161)
    ]
    (tmp_path / "dataset.txt").write_text("".join(blocks))
    return concept1k.task(0, tmp_path / "dataset.txt")


def test_a_question_and_its_paraphrase_are_always_chosen_together(facts_task):
    questions, paraphrases = (list(facts_task.splits[split]()) for split in (TRAIN, TEST))
    assert len(questions) > 100
    of = {other.prompt: one for one, other in zip(questions, paraphrases, strict=True)}
    for one, other in zip(questions, paraphrases, strict=True):
        assert position(one, seed=3) == position(other, seed=3)
    assert len({position(row, seed=3) for row in questions}) == len(questions)
    trained = chosen(facts_task, train_rows=30)
    scored = chosen(facts_task, TEST, test_rows=30)
    assert [of[row.prompt] for row in scored] == trained


def test_duplicate_rows_do_not_exceed_a_limit():
    assert len(chosen(task([1] * 10 + [2] * 10), train_rows=5)) == 5
