"""Which points a search tries: the same for any order of results, cluster or interruption."""

import random
from dataclasses import replace

import pytest
from ray.tune.search import Searcher

from pipeline.search import trial as trials
from pipeline.search.rounds import Rounds
from pipeline.search.search import Search
from pipeline.search.space import space_of
from pipeline.search.trial import Progress, Trial


@pytest.fixture
def search(tiny_config, tmp_path):
    """Makes a search of so many trials; each folder is another one."""

    def make(num_trials, folder="search", *settings):
        config = tiny_config(tmp_path / "storage", *settings)
        return Search(config, space_of(config), num_trials, tmp_path / folder)

    return make


def outcome(trial):
    """Scores that depend on the settings, as those of a real trial."""
    rate, energy = trial.settings["training.learning_rate"], trial.settings["protect.0.energy"]
    learned, retained = min(1.0, rate * 700), min(1.0, energy + 0.1 / (1 + rate * 1000))
    last = Progress(average=(learned + retained) / 2, learned=learned, retained=retained)
    return Progress(average=learned, learned=learned, retained=None), last


def run(search, side_by_side=1, seed=0, stop_after=None, failing=()):
    """Plays Tune: starts trials when it may, ends them in random order. Gives all trials.

    With `stop_after` it dies after so many; those that run then leave their records as they are.
    """
    observed = []
    rounds = Rounds(search, side_by_side, observed.append)
    draw, live, ended, started = random.Random(seed), {}, 0, 0
    while True:
        found = rounds.suggest(f"id{started}")
        if isinstance(found, dict):
            live[f"id{started}"] = found["number"]
            assert len(live) <= side_by_side
            started += 1
            continue
        if not live:
            assert found == Searcher.FINISHED
            return rounds.all(), observed, started
        trial_id = draw.choice(list(live))
        number = live.pop(trial_id)
        folder = search.folder_of(number)
        trial = trials.load(folder)
        if number in failing:
            trial = replace(trial, state="failed", reason="because")
        else:
            trial = replace(trial, state="finished", progress=outcome(trial))
        trial.save(folder)
        rounds.on_trial_result(trial_id, {"task": 2})
        rounds.on_trial_complete(trial_id, {"task": 2})
        ended += 1
        if ended == stop_after:
            return rounds.all(), observed, started


def settings(found):
    return [trial.settings for trial in found[0]]


def test_points_do_not_depend_on_how_many_run_at_a_time_or_which_ends_first(search):
    alone = run(search(10))
    assert len(alone[0]) == 10
    assert len({str(s) for s in settings(alone)}) == 10
    for number, (side_by_side, seed) in enumerate([(2, 1), (4, 2), (9, 3)]):
        assert run(search(10, f"again{number}"), side_by_side, seed)[0] == alone[0]


def test_the_first_point_is_the_config_itself(search):
    assert settings(run(search(1))) == [{"training.learning_rate": 1e-3, "protect.0.energy": 0.8}]


def test_later_rounds_look_at_the_results_of_earlier_ones(search):
    """Random points do not; the estimator's lie nearer to the best of the first rounds."""
    tpe = run(search(40))[0]
    blind = run(search(40, "random", "search.searcher=random"))[0]
    assert [t.settings for t in tpe[:4]] != [t.settings for t in tpe[4:8]]

    def mean_of_last(found):
        return sum(trial.last.average for trial in found[20:]) / 20

    assert mean_of_last(tpe) > mean_of_last(blind) + 0.03


def test_more_trials_go_on_from_fewer(search):
    few = run(search(6, "one"))[0]
    more, _, started = run(search(11, "one"))
    assert more[:6] == few
    assert started == 5
    assert more == run(search(11, "other"))[0]


@pytest.mark.parametrize("stop_after", [1, 3, 4, 7])
def test_an_interrupted_search_goes_on_to_the_same_trials(search, stop_after):
    whole = run(search(9, "whole"))[0]
    run(search(9, "broken"), side_by_side=2, seed=stop_after, stop_after=stop_after)
    resumed, observed, started = run(search(9, "broken"), side_by_side=2)
    assert resumed == whole
    assert started == 9 - stop_after
    assert trials.best(resumed) == trials.best(whole)
    assert {trial.number for trial in observed} == set(range(9))


def test_a_failed_trial_ends_nothing_and_is_tried_again_the_next_time(search):
    found = run(search(6), failing={1, 4})[0]
    assert [trial.state for trial in found] == [
        "failed" if number in (1, 4) else "finished" for number in range(6)
    ]
    assert found[1].reason == "because"
    again, _, started = run(search(6))
    assert started >= 2
    assert all(trial.state == "finished" for trial in again)
    assert [t.settings for t in again[:4]] == [t.settings for t in found[:4]]


def test_settings_that_do_not_agree_are_a_failed_trial_that_never_starts(search):
    fresh = "{kind: project}"
    space = "{adapter.fresh: {type: choice, values: [true, false]}, adapter.merge: {type: choice, "
    space += "values: [true, false]}}"
    found, _, started = run_states(
        search(8, "adapters", f"protect=[{fresh}]", "adapter.rank=4", f"search.space={space}")
    )
    bad = [t for t in found if t.settings["adapter.fresh"] and not t.settings["adapter.merge"]]
    assert bad
    assert started == 8 - len(bad)
    for trial in bad:
        assert trial.state == "failed"
        assert "adapter.merge: must be true" in trial.reason


def run_states(search):
    """As `run`, for any settings."""
    rounds = Rounds(search, 1, lambda trial: None)
    started = 0
    while isinstance(found := rounds.suggest(f"id{started}"), dict):
        folder = search.folder_of(found["number"])
        done = Progress(average=0.5, learned=0.5, retained=0.5)
        replace(trials.load(folder), state="finished", progress=(done, done)).save(folder)
        rounds.on_trial_complete(f"id{started}", {})
        started += 1
    return rounds.all(), None, started


def test_a_trial_that_tune_stopped_is_recorded_so_and_pruned(search):
    of = search(2)
    rounds = Rounds(of, 2, lambda trial: None)
    for number in (0, 1):
        rounds.suggest(f"id{number}")
        trial = trials.load(of.folder_of(number))
        replace(trial, progress=outcome(trial)[:1]).save(of.folder_of(number))
        rounds.on_trial_result(f"id{number}", {"task": 1})
    rounds.on_trial_complete("id0", {"task": 1})
    rounds.on_trial_complete("id1", None, error=True)
    first, second = rounds.all()
    assert (first.state, len(first.progress)) == ("stopped", 1)
    assert second.state == "failed"
    assert "lost 3 times" in second.reason
    assert rounds.suggest("id2") == Searcher.FINISHED
    assert [trial.state.name for trial in rounds.study.trials] == ["PRUNED", "FAIL"]
    assert trials.load(of.folder_of(0)) == first


def test_both_sides_can_be_the_objective(search):
    found = run(search(12, "sides", "search.objective=retained_and_learned"))[0]
    front = trials.pareto_front(found)
    assert trials.best(found) in front
    for trial in found:
        beaten = any(
            o.last.retained >= trial.last.retained
            and o.last.learned >= trial.last.learned
            and (o.last.retained, o.last.learned) != (trial.last.retained, trial.last.learned)
            for o in found
        )
        assert beaten == (trial not in front)


def test_records_survive_as_they_are(tmp_path):
    trial = Trial(3, {"importance.top_k": None}, "failed", outcome_of_nothing(), 1.5, "why")
    trial.save(tmp_path / "trial")
    assert trials.load(tmp_path / "trial") == trial
    (tmp_path / "trial" / trials.RECORD).write_text("{")
    assert trials.load(tmp_path / "trial") is None


def outcome_of_nothing():
    return (Progress(average=0.0, learned=0.0, retained=None),)


def test_progress_is_of_the_tasks_so_far():
    rows = [
        {"a": {"m": 0.0, "g": 0.1}, "b": {"m": 0.0, "g": 0.3}, "skill": {"m": 1.0}},
        {"a": {"m": 0.8, "g": 0.6}, "b": {"m": 0.2, "g": 0.0}, "skill": {"m": 0.5}},
        {"a": {"m": 0.4, "g": 0.2}, "b": {"m": 1.0, "g": 0.6}, "skill": {"m": 0.4}},
    ]
    first = trials.progress_after(rows[:2], ["a", "b"])
    assert first == Progress(average=pytest.approx(0.7), learned=pytest.approx(0.7), retained=None)
    second = trials.progress_after(rows, ["a", "b"])
    assert second.average == pytest.approx((0.4 + 1.0 + 0.2 + 0.6) / 4)
    assert second.learned == pytest.approx((0.8 + 1.0 + 0.6 + 0.6) / 4)
    assert second.retained == pytest.approx((0.4 + 0.2) / 2)


def test_the_table_has_a_row_a_trial_and_a_column_a_setting():
    done = (Progress(average=0.5, learned=0.75, retained=0.25),)
    found = trials.table(
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
