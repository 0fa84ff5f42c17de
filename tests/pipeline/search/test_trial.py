"""The record of a trial: its scores by task, and its row of the table."""

import pytest

from pipeline.search.trial import Progress, Trial, best, progress_after, table, undecided

ROWS = [
    {"a": {"m": 0.0, "g": 0.1}, "b": {"m": 0.0, "g": 0.3}, "skill": {"m": 1.0}},
    {"a": {"m": 0.8, "g": 0.6}, "b": {"m": 0.2, "g": 0.0}, "skill": {"m": 0.5}},
    {"a": {"m": 0.4, "g": 0.2}, "b": {"m": 1.0, "g": 0.6}, "skill": {"m": 0.4}},
]


def test_progress_is_of_the_tasks_so_far():
    first = progress_after(ROWS[:2], ["a", "b"])
    assert first == Progress(average=pytest.approx(0.7), learned=pytest.approx(0.7), retained=None)
    second = progress_after(ROWS, ["a", "b"])
    assert second.average == pytest.approx((0.4 + 1.0 + 0.2 + 0.6) / 4)
    assert second.learned == pytest.approx((0.8 + 1.0 + 0.6 + 0.6) / 4)
    assert second.retained == pytest.approx((0.4 + 0.2) / 2)


def test_tasks_trained_alone_are_scored_by_their_own_models():
    alone = progress_after(ROWS, ["a", "b"], alone=True)
    assert alone.average == alone.learned == pytest.approx((0.8 + 1.0 + 0.6 + 0.6) / 4)
    assert alone.retained == pytest.approx((0.8 + 0.6) / 2)


def test_trials_that_all_score_the_same_decide_nothing():
    def tried(number, average, state="finished", method="agcl"):
        progress = (Progress(average=average, learned=average, retained=None),)
        return Trial(number, {"method": method}, state, progress)

    same = [tried(0, 0.0), tried(1, 0.0), tried(2, 0.5, "stopped"), Trial(3, {}, "failed")]
    said = undecided(same)
    assert said.startswith("all 2 finished trials score 0.000 on validation rows")
    assert "\n" not in said
    for decided in ([], same[:1], [*same, tried(4, 0.1)]):
        assert undecided(decided) is None


def test_the_first_of_equal_finished_trials_is_the_best():
    low, high = (Progress(average=a, learned=a, retained=a) for a in (0.5, 0.7))
    trials = [
        Trial(0, {}, "finished", (low,)),
        Trial(1, {}, "finished", (low, high)),
        Trial(2, {}, "finished", (high,)),
        Trial(3, {}, "stopped", (Progress(average=0.9, learned=0.9, retained=None),)),
    ]
    assert best(trials).number == 1
    assert best(trials[3:]) is None


def test_the_table_has_a_row_per_trial_and_a_column_per_setting():
    done = (Progress(average=0.5, learned=0.75, retained=0.25),)
    found = table(
        [
            Trial(0, {"x": 1, "y": None, "z": "cp"}, "finished", done, 2.0),
            Trial(1, {"x": 0.5, "y": 4, "z": 3}, "failed", (), 0.0, "why"),
        ]
    ).to_pylist()
    assert found[0] == {
        "trial": 0,
        "state": "finished",
        "task": 1,
        "average": 0.5,
        "learned": 0.75,
        "retained": 0.25,
        "seconds": 2.0,
        "reason": None,
        "x": 1.0,
        "y": None,
        "z": "cp",
    }
    assert (found[1]["average"], found[1]["reason"]) == (None, "why")
    assert (found[1]["x"], found[1]["y"], found[1]["z"]) == (0.5, 4, "3")
