"""Checks of task names and rows."""

import pytest

from agcl.errors import InputError
from agcl.tasks import TRAIN, Row, Task, check_names, check_rows


def task_of(*rows, name="north"):
    return Task(name=name, splits={TRAIN: lambda: iter(rows)})


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b", "a\0b", "/"])
def test_a_name_that_cannot_be_a_folder_is_refused_with_its_index(name):
    with pytest.raises(InputError, match="task 2"):
        check_names(["first", name])


def test_a_repeated_name_is_refused_and_shown():
    with pytest.raises(InputError, match=r"task 3.*'north'"):
        check_names(["north", "south", "north"])


def test_ordinary_names_pass():
    check_names([])
    check_names(["north", "North-2", "C-STANCE", "20Minuten", ".hidden", "ünï code", "..."])


def test_rows_are_counted():
    assert check_rows(task_of(Row("a", "b"), Row("c", "d")), TRAIN) == 2


def test_blank_rows_are_not_counted():
    empty = [Row("a", ""), Row("a", " \n"), Row(" ", "b")]
    assert check_rows(task_of(Row("a", "b"), *empty, Row("e", "f")), TRAIN) == 2
    with pytest.raises(InputError, match=r"north.*train.*no rows"):
        check_rows(task_of(*empty), TRAIN)


def test_a_split_without_rows_is_refused():
    with pytest.raises(InputError, match=r"north.*train.*no rows"):
        check_rows(task_of(), TRAIN)
