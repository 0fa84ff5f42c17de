"""Built-in tasks: deterministic, with the documented size and overlap."""

import pickle
import re
from itertools import pairwise

import pytest

from agcl.tasks import TEST, TRAIN, check_names, check_rows, facts

SIZES = {"entities": 5, "base_entities": 7}


def tasks(num_tasks=4, seed=0):
    return [facts.task(index, seed=seed, **SIZES) for index in range(num_tasks)]


def rows(task, split=TRAIN):
    return list(task.splits[split]())


def people(task):
    """The invented names: capitalized words in the questions, except the first word."""
    found = set()
    for row in rows(task):
        question = row.prompt.removeprefix("Question: ").split("?")[0]
        found.update(re.findall(r"(?<= )[A-Z][a-z]+", question))
    return found


def answers_by_question(task):
    """Question without the name -> answers."""
    names, table = people(task), {}
    for row in rows(task):
        question = re.sub("|".join(names), "X", row.prompt)
        table.setdefault(question, set()).add(row.answer)
    return table


def test_every_task_asks_about_four_relations_of_every_person():
    for task in tasks(8):
        assert check_rows(task, TRAIN) == check_rows(task, TEST) == 5 * 4
        assert len(people(task)) == 5
        assert len(answers_by_question(task)) == 4
        assert task.scored == {"memorization": TRAIN, "generalization": TEST}
        assert next(iter(task.scored)) == "memorization"


def test_base_holds_both_questions_of_every_fact():
    base = facts.base(entities=7, seed=0)
    assert check_rows(base, TRAIN) == 7 * 4 * 2
    assert base.scored == {"memorization": TRAIN}


def test_people_of_base_and_all_tasks_are_disjoint():
    groups = [people(facts.base(entities=7, seed=0)), *map(people, tasks(8))]
    assert [len(g) for g in groups] == [7] + [5] * 8
    assert len(set.union(*groups)) == 7 + 5 * 8


def test_neighboring_tasks_share_some_relations():
    for first, second in pairwise(map(answers_by_question, tasks(8))):
        shared = first.keys() & second.keys()
        assert 0 < len(shared) < 4


def test_a_paraphrase_is_another_question_with_the_same_answer():
    for task in tasks():
        for trained, tested in zip(rows(task), rows(task, TEST), strict=True):
            assert trained.prompt != tested.prompt
            assert trained.answer == tested.answer
        assert not {r.prompt for r in rows(task)} & {r.prompt for r in rows(task, TEST)}


def test_no_question_is_asked_twice_in_a_task():
    for task in tasks():
        assert len({row.prompt for row in rows(task)}) == 20


def test_the_seed_determines_everything():
    def content(seed):
        return [(t.name, rows(t), rows(t, TEST)) for t in tasks(seed=seed)]

    assert content(3) == content(3)
    assert all(a[1] != b[1] for a, b in zip(content(3), content(4), strict=True))
    base = [rows(facts.base(entities=7, seed=s)) for s in (3, 3, 4)]
    assert base[0] == base[1] != base[2]


@pytest.mark.parametrize("num_tasks", [1, 20, 30])
def test_names_can_be_folders(num_tasks):
    names = [task.name for task in tasks(num_tasks)]
    assert len(names) == num_tasks
    check_names(names)


def test_row_sources_can_be_pickled():
    task = tasks()[1]
    assert rows(pickle.loads(pickle.dumps(task))) == rows(task)
