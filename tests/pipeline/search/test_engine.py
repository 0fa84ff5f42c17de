"""Which points a search tries, and what becomes of its trials: on Ray Tune, with made-up scores."""

import os
import random
import time

import pytest
import ray
from optuna.trial import TrialState
from ray import tune
from ray.tune.search import ConcurrencyLimiter

from pipeline.execution.cluster import WORKER_ENVIRONMENT
from pipeline.execution.workers import here
from pipeline.search import engine
from pipeline.search.engine import Points, Search, run_trials
from pipeline.search.space import space_of


@pytest.fixture
def search(tiny_config, tmp_path):
    """Makes a search of two tasks, in a new folder."""

    def make(num_trials, *settings, folder="search"):
        config = tiny_config(tmp_path / "storage", "training.learning_rate=1e-3", *settings)
        config.storage.root.mkdir(exist_ok=True)  # As the driver has made it before a trial.
        return Search(config, tmp_path / folder, num_trials, space_of(config))

    return make


def outcome(rate, energy):
    """Scores after both tasks that depend on the settings, as those of a real trial."""
    learned, retained = min(1.0, rate * 700), min(1.0, energy + 0.1 / (1 + rate * 1000))
    first = {"average": learned, "learned": learned, "retained": None, "base_kept": None}
    average = (learned + retained) / 2
    last = {"average": average, "learned": learned, "retained": retained, "base_kept": None}
    return {"task": 1, **first}, {"task": 2, **last}


def play(search, seed=0, failed=(), stopped=()):
    """Runs the rounds in random order without Ray; gives the points and the study's trials."""
    points = Points(search, num_tasks=2)
    rounds = ConcurrencyLimiter(points, max_concurrent=search.config.search.round, batch=True)
    draw, asked, live = random.Random(seed), [], {}
    while True:
        while len(asked) < search.num_trials and (found := rounds.suggest(f"{len(asked)}")):
            live[f"{len(asked)}"] = found["trial"]
            asked.append(found["trial"]["settings"])
        if not live:
            return asked, points._ot_study.trials
        trial_id = draw.choice(list(live))
        trial = live.pop(trial_id)
        first, last = outcome(*trial["settings"].values())
        rounds.on_trial_result(trial_id, {**first, "training_iteration": 1})
        if trial["number"] in failed:
            report = {"reason": "because"}
            rounds.on_trial_result(trial_id, {**report, "training_iteration": 2})
            rounds.on_trial_complete(trial_id, report)
        else:
            rounds.on_trial_complete(trial_id, first if trial["number"] in stopped else last)


def test_points_do_not_depend_on_which_trial_of_a_round_ends_first(search):
    ten = play(search(10, "search.round=4"))[0]
    assert ten[0] == {"training.learning_rate": 1e-3, "protect.0.energy": 0.8}
    assert len({str(point) for point in ten}) == 10
    for seed in range(1, 6):
        assert play(search(10, "search.round=4"), seed)[0] == ten
    # A partial last round of fewer trials is the beginning of the same round of more.
    assert play(search(17, "search.round=4"))[0][:10] == ten


def test_later_rounds_depend_on_the_results_of_earlier_ones(search):
    def mean_of_last(*settings):
        found = play(search(40, *settings))[0]
        return sum(outcome(*point.values())[1]["average"] for point in found[20:]) / 20

    assert mean_of_last() > mean_of_last("search.searcher=random") + 0.03


def test_optuna_learns_which_trials_failed_or_were_stopped(search):
    of = search(8, "search.round=4")
    points, known = play(of, failed={1}, stopped={2})
    assert points[:4] == play(of)[0][:4]
    assert (known[1].state, known[1].value) == (TrialState.FAIL, None)
    assert known[2].state == TrialState.PRUNED  # With the last score: one after fewer tasks.
    assert {trial.state for trial in known[3:]} == {TrialState.COMPLETE}
    for seed in range(1, 6):
        assert play(of, seed, failed={1}, stopped={2})[0] == points


def test_both_sides_can_be_the_objective(search):
    of = search(12, "search.objective=retained_and_learned")
    points, known = play(of, failed={3}, stopped={5})
    assert [trial.values is None for trial in known].count(True) == 2
    for point, trial in zip(points, known, strict=True):
        last = outcome(*point.values())[1]
        assert trial.values in (None, [last["retained"], last["learned"]])
    assert play(of, 1, failed={3}, stopped={5})[0] == points


BOTH = (
    "search.space={training.learning_rate: {type: loguniform, low: 1e-4, high: 1e-2}, "
    "protect.0.energy: {type: uniform, low: 0.5, high: 0.95}}"
)


def test_the_base_and_the_average_can_be_the_objective(search, monkeypatch):
    scored = outcome

    def costly(rate, energy):
        return [{**scores, "base_kept": energy} for scores in scored(rate, energy)]

    monkeypatch.setitem(globals(), "outcome", costly)
    points, known = play(search(6, "search.objective=base_and_average", BOTH))
    for point, trial in zip(points, known, strict=True):
        last = costly(*point.values())[1]
        assert trial.values == [last["base_kept"], last["average"]]


@pytest.fixture(scope="module")
def two_cpus():
    environment = {"env_vars": dict(WORKER_ENVIRONMENT)}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    yield
    ray.shutdown()


@pytest.fixture
def on_tune(two_cpus, monkeypatch):
    """Runs a search on Ray Tune with `body` for what a trial does; gives the trials."""

    def run(search, body, side_by_side=2):
        monkeypatch.setattr(engine, "run_trial", body)
        observed = []
        found = run_trials(search, set(), side_by_side, observed.append)
        assert {trial.number: trial for trial in observed} == dict(enumerate(found))
        return found

    return run


def scoring(outcome=outcome):
    """What a trial reports; nested, so that it is sent to Ray's processes as it is."""

    def report(run):
        rate, energy = run.config.training.learning_rate, run.config.protect[0].energy
        for scores in outcome(rate, energy):
            tune.report({"seconds": 1.0, **scores})

    return report


@pytest.mark.ray
@pytest.mark.slow  # Ray starts lost processes again one by one.
@pytest.mark.timeout(300)
def test_tune_tries_the_same_points_on_any_cluster_and_records_every_outcome(
    search, on_tune, tmp_path
):
    """Seven trials in rounds of three, of which one fails, one's process dies, one once."""
    report = scoring()

    def body(run, shared):
        number = run.folder.name.removeprefix("trial-")
        if number == "1":
            tune.report({"reason": "stage train/1: loss", "traceback": "line 1"})
            return
        if number == "3" or (number == "4" and not (marker := tmp_path / "died").exists()):
            if number == "4":
                marker.touch()
            os._exit(1)
        time.sleep(0.3 if number in "02" else 0)
        report(run)

    settings = ("search.round=3",)
    found = on_tune(search(7, *settings), body)
    states = ["finished", "failed", "finished", "failed", "finished", "finished", "finished"]
    assert [trial.state for trial in found] == states
    assert found[1].reason == "stage train/1: loss"
    assert (tmp_path / "search" / "trials" / "trial-1" / "error.log").read_text() == "line 1"
    assert "lost 3 times" in found[3].reason
    points, _ = play(search(7, *settings), failed={1, 3})
    assert [trial.settings for trial in found] == points
    for trial in found:
        if trial.state == "finished":
            scores = outcome(*trial.settings.values())[1]
            assert (len(trial.progress), trial.last.average) == (2, scores["average"])
    assert not (tmp_path / "search" / ".ray-tune").exists()


@pytest.mark.ray
@pytest.mark.timeout(300)
@pytest.mark.slow
def test_trials_whose_workers_compute_do_not_take_their_place(search, on_tune):
    """Each needs both CPUs for its workers: two trials at once would wait for each other."""
    report = scoring()

    def body(run, shared):
        def stage():
            time.sleep(0.2)

        # As Ray Train does: outside of the trial's placement group, with an actor on the head.
        needs = {"num_cpus": 2, "resources": {"node:__internal_head__": 0.001}}
        ray.get(ray.remote(scheduling_strategy=here(), **needs)(stage).remote())
        report(run)

    of = search(3, "resources.num_workers=2", "search.round=3")
    found = on_tune(of, body, side_by_side=1)
    assert [trial.state for trial in found] == ["finished"] * 3
    assert [trial.settings for trial in found] == play(of)[0]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(300)
def test_a_bad_trial_is_stopped_early_and_contradicting_settings_fail(search, on_tune):
    def falling(rate, energy):
        value = 0.9 if rate > 1e-3 else 0.1
        yield {"task": 1, "average": value, "learned": value, "retained": None, "base_kept": None}
        time.sleep(0.5)  # The decision to stop comes while it works on.
        yield {"task": 2, "average": value, "learned": value, "retained": value, "base_kept": None}

    report = scoring(falling)

    def body(run, shared):
        report(run)

    space = "search.space={training.learning_rate: {type: choice, values: [1e-2, 1e-4]}}"
    found = on_tune(
        search(6, space, "search.stopping=asha", "resources.cpus_per_worker=2"), body, 1
    )
    stopped = [trial for trial in found if trial.state == "stopped"]
    assert stopped
    assert all(len(trial.progress) == 1 for trial in stopped)
    assert all(trial.settings["training.learning_rate"] == 1e-4 for trial in stopped)

    choice = "{type: choice, values: [true, false]}"
    space = f"search.space={{adapter.fresh: {choice}, adapter.merge: {choice}}}"
    of = search(6, "protect=[{kind: project}]", "adapter.rank=4", space, folder="adapters")
    found = on_tune(of, body)
    for trial in found:
        bad = trial.settings["adapter.fresh"] and not trial.settings["adapter.merge"]
        assert trial.state == ("failed" if bad else "finished")
        assert not bad or "adapter.merge: must be true" in trial.reason
    assert {trial.state for trial in found} == {"failed", "finished"}
