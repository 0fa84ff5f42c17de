"""The record of a trial: its scores by task, and its row of the table."""

import pytest

from pipeline.search.trial import (
    Progress,
    Trial,
    base_kept,
    best,
    progress_after,
    table,
    unbounded,
    undecided,
)

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


def test_the_best_may_have_to_keep_as_much_of_the_base_as_the_configs_own_settings():
    def tried(number, average, kept, state="finished"):
        return Trial(number, {}, state, (Progress(average, average, None, kept),))

    trials = [tried(0, 0.5, -3.2), tried(1, 0.9, -3.3), tried(2, 0.7, -3.2), tried(3, 0.6, -3.1)]
    assert best(trials).number == 1
    assert best(trials, keep_base=True).number == 2
    assert best(trials[:2], keep_base=True).number == 0
    unknown = [tried(0, 0.5, -3.2, "failed"), *trials[1:]]
    assert best(unknown, keep_base=True).number == 1
    assert unbounded(trials) is None
    assert "trial 0 did not finish" in unbounded(unknown)
    nothing = [tried(0, 0.5, 0.0), tried(1, 0.6, 0.0)]
    assert best(nothing, keep_base=True).number == 1


def test_the_base_is_known_by_its_facts_or_by_its_loss_on_a_text():
    assert base_kept(ROWS[1], "skill", {"text_loss": 3.2}) == 0.5
    assert base_kept(ROWS[1], None, {"text_loss": 3.2}) == -3.2
    assert base_kept(ROWS[1], None, {}) is None


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
        "base_kept": None,
        "seconds": 2.0,
        "reason": None,
        "x": 1.0,
        "y": None,
        "z": "cp",
    }
    assert (found[1]["average"], found[1]["reason"]) == (None, "why")
    assert (found[1]["x"], found[1]["y"], found[1]["z"]) == (0.5, 4, "3")
