"""The tuning budget: what is tried, what is chosen, and that it costs no reported run."""

import io
import json
from types import SimpleNamespace

import pytest
from rich.console import Console

from agcl.errors import InputError
from jobs import tuning as job
from pipeline.config.presets import METHODS
from pipeline.run import execute_trials, open_run
from pipeline.search import tuning


@pytest.fixture
def load(tiny_config, tmp_path):
    """Loads the tiny config for a method with more settings."""
    return lambda settings, method: tiny_config(tmp_path / "storage", *settings, method=method)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_the_same_budget_and_its_defaults_first(load, method):
    config = load([], method)
    tried = tuning.candidates(config, 5)
    assert len(tried) == 5
    assert tried[0] == []
    configs = [load(settings, method) for settings in tried]  # All are valid settings.
    rates = [each.training.learning_rate for each in configs]
    assert len(set(rates)) == 5
    middle = rates[0] * (10 if config.adapter else 1)
    assert all(middle / 4 <= rate <= middle * 4 for rate in rates[1:])
    alike = "lora" if config.adapter else "sequential"
    assert tuning.candidates(load([], alike), 5)[3][0] == tried[3][0]
    knob = METHODS[method].knob
    if knob:
        own = [settings[1] for settings in tried if len(settings) == 2]
        values = [float(setting.removeprefix(f"{knob.key}=")) for setting in own]
        assert len(set(values)) == (3 if config.adapter else 4)
        assert all(knob.low <= value <= knob.high for value in values)


def test_a_smaller_budget_is_the_beginning_of_a_larger_one(load):
    config = load([], "agcl")
    assert tuning.candidates(config, 3) == tuning.candidates(config, 9)[:3]


def rates_of(tried):
    return [float(settings[0].split("=")[1]) for settings in tried]


def test_three_trials_look_below_and_above(load):
    tried = tuning.candidates(load(["training.learning_rate=1.0e-3"], "agcl"), 3)
    assert tried[0] == []
    assert rates_of(tried[1:]) == [5e-4, 2e-3]


def test_trials_of_lora_go_about_ten_times_the_rate_and_its_defaults_are_tried_there(load):
    tried = tuning.candidates(load(["training.learning_rate=1.0e-3"], "olora"), 4)
    assert tried[:2] == [[], ["training.learning_rate=1.00e-02"]]
    assert rates_of(tried[2:]) == [5e-3, 2e-2]
    assert tuning.candidates(load(["training.learning_rate=1.0e-3"], "olora"), 2) == tried[:2]


def test_the_rates_of_a_large_budget_fill_the_range(load):
    config = load([], "agcl")
    lower = sum(float(s[0].split("=")[1]) < 1e-3 for s in tuning.candidates(config, 41)[1:])
    assert lower in (19, 20, 21)


def test_trials_have_a_seed_that_no_reported_run_has(load):
    config = load(["seed=7"], "agcl")
    trial = tuning.trial(config, 2)
    assert trial.seed == 7 + tuning.SEED_OFFSET
    assert trial.name != config.name


def result(**scores):
    """A result whose rows to choose by say this, and whose test rows the opposite."""
    validation = {name: {"average_performance": score} for name, score in scores.items()}
    test = {name: {"average_performance": 1 - score} for name, score in scores.items()}
    return SimpleNamespace(metrics={"validation": validation, "evaluation_sets": test})


def test_a_trial_is_scored_by_its_validation_rows_over_all_sets():
    assert tuning.score(result(memorization=0.9, generalization=0.3)) == pytest.approx(0.6)


def test_the_first_of_equal_trials_is_chosen():
    assert tuning.best({0: 0.5, 1: 0.7, 2: 0.7}) == 1


@pytest.fixture
def trials(monkeypatch, load, tmp_path):
    """Tunes two methods with made-up scores of their trials; None is a failed one."""

    def tune(scores):
        def execute_trials(runs, *_, **__):
            assert list(runs) == list(scores)
            return {k: result(set=v) for k, v in scores.items() if v is not None}

        monkeypatch.setattr(job, "execute_trials", execute_trials)
        (tmp_path / "compare" / "tuning").mkdir(parents=True)
        return job.tune(load, ["sequential", "agcl"], 2, tmp_path / "compare", "agcl test")

    return tune


def test_every_method_takes_its_best_trial_and_all_are_written_down(trials, tmp_path):
    scores = {"sequential-0": 0.4, "sequential-1": 0.3, "agcl-0": None, "agcl-1": 0.2}
    chosen = trials(scores)
    assert chosen["sequential"] == []
    rate, energy = chosen["agcl"]
    assert rate.startswith("training.learning_rate=")
    assert energy.startswith("protect.0.energy=")
    written = json.loads((tmp_path / "compare" / "tuning" / "tuning.json").read_text())
    assert [trial["score"] for trial in written["agcl"]["trials"]] == [None, 0.2]
    assert written["agcl"]["chosen"] == 1


def test_a_rate_at_the_end_of_what_was_tried_is_told():
    rates = {0: 1e-3, 1: 3e-3, 3: 2.5e-4}
    assert [tuning.edge(rates, n) for n in rates] == [None, "largest", "smallest"]
    assert tuning.edge({0: 1e-3, 1: 3e-3}, 1) is None


def test_methods_whose_best_rate_is_the_last_tried_are_named(load, monkeypatch, tmp_path, capsys):
    rates = [s[0].split("=")[1] for s in tuning.candidates(load([], "sequential"), 4)[1:]]
    number = 1 + rates.index(min(rates, key=float))
    results = {f"sequential-{n}": result(set=0.9 if n == number else 0.1) for n in range(4)}
    monkeypatch.setattr(job, "execute_trials", lambda *_, **__: results)
    (tmp_path / "compare" / "tuning").mkdir(parents=True)
    job.tune(load, ["sequential"], 4, tmp_path / "compare", "agcl test")
    said = " ".join(capsys.readouterr().out.split())
    assert "The smallest learning rate tried was the best of sequential: a still smaller" in said


def test_a_method_without_a_finished_trial_is_named(trials):
    with pytest.raises(InputError, match="every trial of method agcl failed"):
        trials({"sequential-0": 0.4, "sequential-1": 0.3, "agcl-0": None, "agcl-1": None})


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_failed_trial_does_not_end_the_others(finished, tiny_config, copy_stages, tmp_path):
    """On Ray, the base model taken from earlier runs; the run that fails comes first."""
    folder, storage = tmp_path / "trials", tmp_path / "storage"
    copy_stages(finished.storage, storage, ("tokenizer", "prepare", "pretrain", "evaluate-0"))
    settings = {"diverged": ["training.learning_rate=1e30"], "fine": ["training.epochs=1"]}
    runs = {
        label: open_run(
            tiny_config(storage, *more, name=label, method="sequential"), folder / label
        )
        for label, more in settings.items()
    }
    out = io.StringIO()
    results = execute_trials(
        runs, folder, title="trials", command="agcl test", console=Console(file=out, width=200)
    )
    assert list(results) == ["fine"]
    assert results["fine"].metrics["learning_accuracy"] >= 0
    assert "failed trial stage train/1-harbour failed: " in out.getvalue()
    assert list((folder / "logs").glob("train-1-harbour-*.log"))
