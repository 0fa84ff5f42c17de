"""The tuning budget: what is tried, what is chosen, and that it costs no reported run."""

import io
import json
from contextlib import nullcontext

import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient
from rich.console import Console

from agcl.errors import InputError
from pipeline.config.presets import METHODS
from pipeline.errors import Failed
from pipeline.search import tuning
from pipeline.search.search import claim_folder, example_runs, in_several
from pipeline.search.trial import Progress, Trial
from pipeline.search.tuning import arguments, candidates, choose, execute_tuning, open_tuning
from pipeline.tracking.sync import Mirror

RATE = "training.learning_rate"


@pytest.fixture
def load(tiny_config, tmp_path):
    """Loads the tiny config for a method with more settings."""
    return lambda settings, method: tiny_config(tmp_path / "storage", *settings, method=method)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_the_same_budget_and_its_defaults_first(load, method):
    config = load([], method)
    tried = candidates(config, 5)
    assert len(tried) == 5
    assert tried[0] == {}
    configs = [load(arguments(settings), method) for settings in tried]  # All are valid settings.
    rates = [each.training.learning_rate for each in configs]
    assert rates[1:] == [settings[RATE] for settings in tried[1:]]
    assert len(set(rates)) == 5
    middle = rates[0] * (10 if config.adapter else 1)
    assert all(middle / 4 <= rate <= middle * 4 for rate in rates[1:])
    alike = "lora" if config.adapter else "sequential"
    assert [s.get(RATE) for s in candidates(load([], alike), 5)] == [s.get(RATE) for s in tried]
    knob = METHODS[method].knob
    if knob:
        values = [settings[knob.key] for settings in tried if knob.key in settings]
        assert len(set(values)) == (3 if config.adapter else 4)
        assert all(knob.low <= value <= knob.high for value in values)


@pytest.mark.parametrize(
    ("method", "acts"),
    [
        ("agcl", False),
        ("ewc", False),
        ("gate", False),
        ("ewc_base", True),
        ("project_weights", True),
        ("kl", True),
    ],
)
def test_one_task_alone_tunes_nothing_that_protects_earlier_ones(load, method, acts):
    tried = candidates(load(["tasks.count=1"], method), 4)
    assert any(settings.keys() - {RATE} for settings in tried) is acts


def test_methods_with_the_same_knob_try_the_same_values(load):
    tried = candidates(load([], "agcl"), 6)
    for control in METHODS["agcl"].controls:
        assert candidates(load([], control), 6) == tried


def test_no_more_energy_is_tried_than_is_stored(load):
    config = load(["importance.keep=0.8"], "agcl")
    tried = candidates(config, 6)
    assert max(settings.get("protect.0.energy", 0) for settings in tried) == 0.8
    for settings in tried:
        load(["importance.keep=0.8", *arguments(settings)], "agcl")


def test_a_smaller_budget_is_the_beginning_of_a_larger_one(load):
    config = load([], "agcl")
    assert candidates(config, 3) == candidates(config, 9)[:3]


def test_three_trials_look_below_and_above(load):
    tried = candidates(load(["training.learning_rate=1.0e-3"], "agcl"), 3)
    assert [settings.get(RATE) for settings in tried] == [None, 5e-4, 2e-3]


def test_trials_of_lora_go_about_ten_times_the_rate_and_its_defaults_are_tried_there(load):
    config = load(["training.learning_rate=1.0e-3"], "olora")
    tried = candidates(config, 4)
    assert tried[:2] == [{}, {RATE: 1e-2}]
    assert [settings[RATE] for settings in tried[2:]] == [5e-3, 2e-2]
    assert candidates(config, 2) == tried[:2]


def test_the_rates_of_a_large_budget_fill_the_range(load):
    tried = candidates(load([], "agcl"), 41)[1:]
    assert sum(settings[RATE] < 1.5e-3 for settings in tried) in (19, 20, 21)


def test_trials_have_their_own_seed_and_score_validation_rows_only(load, tmp_path):
    search = open_tuning(
        lambda more, method: load(["seed=7", *more], method), ["agcl"], 3, tmp_path
    )
    for number in range(3):
        config = search.run_of(number, {}).config
        assert config.seed == 7 + tuning.SEED_OFFSET
        assert config.evaluation.rows == "validation"
        assert config.evaluation.validation == 0.3


@pytest.mark.parametrize("method", ["agcl", "base_unprotected"])
def test_what_trials_of_several_methods_share_is_found_beforehand(load, tmp_path, method):
    search = open_tuning(load, ["sequential", method], 2, tmp_path)
    runs = example_runs(search)
    assert list(runs) == ["sequential-0", "sequential-1", f"{method}-0", f"{method}-1"]
    shared = in_several(runs)
    protects_base = method == "agcl"
    for run in runs.values():
        own = {name for name, s in run.resolved.items() if s.folder.name not in shared}
        attributed = {"attribute/1-harbour"} if run.config.method == method else set()
        first = {"train/1-harbour", "evaluate/1-harbour"} if protects_base else set()
        assert own == attributed | first | {"train/2-valley", "evaluate/2-valley"}
    # Both rates of the first task, once for both methods if nothing protects the base.
    assert sum(name.startswith("train-1") for name in shared) == (0 if protects_base else 2)
    assert sum(name.startswith("attribute-0-base") for name in shared) == protects_base


def trials(scores, method="agcl", first=0):
    """Trials with these averages; None is a failed one."""
    return [
        Trial(number, {"method": method, RATE: 1e-3 * number}, "failed", reason="why")
        if score is None
        else Trial(
            number,
            {"method": method, RATE: 1e-3 * number},
            "finished",
            (Progress(average=score, learned=score, retained=None),),
        )
        for number, score in enumerate(scores, start=first)
    ]


def test_the_first_of_equal_trials_is_chosen_and_all_are_listed():
    chosen = choose(trials([None, 0.5, 0.7, 0.7]), [0, 1e-3, 2e-3, 3e-3])
    assert (chosen.chosen, chosen.score) == (2, 0.7)
    assert chosen.settings == ["training.learning_rate=2.00e-03"]
    assert [trial["score"] for trial in chosen.trials] == [None, 0.5, 0.7, 0.7]
    assert choose(trials([None, None]), [1, 2]) is None


def test_a_rate_at_the_end_of_those_tried_is_named():
    rates = [1e-3, 3e-3, 9e-3, 2.5e-4]  # The third one failed.
    edges = []
    for best in (0, 1, 3):
        scores = [0.1, 0.1, None, 0.1]
        scores[best] = 0.9
        edges.append(choose(trials(scores), rates).edge)
    assert edges == [None, "largest", "smallest"]
    assert choose(trials([0.1, 0.2]), rates).edge is None


def test_the_same_comparison_may_name_its_methods_in_another_order(load, tmp_path):
    """The stored config of the trials is that of the first method's."""

    def claim(*methods, settings=()):
        folder = tmp_path / "storage" / "tuning"
        folder.mkdir(parents=True, exist_ok=True)
        claim_folder(open_tuning(lambda more, m: load([*settings, *more], m), methods, 1, folder))

    claim("sequential", "agcl")
    claim("agcl", "sequential")
    claim("lora_agcl")
    with pytest.raises(InputError, match=r"holds a search with training\.epochs=12, not 3;"):
        claim("sequential", settings=["training.epochs=3"])


@pytest.fixture
def execute(monkeypatch, load, tmp_path):
    """Tunes two methods with made-up scores of their trials; None is a failed one."""

    def untracked(settings, method):
        return load(["tracking.enabled=false", *settings], method)

    def run(scores):
        folder = tmp_path / "storage" / "tuning"
        search = open_tuning(untracked, ["sequential", "agcl"], 2, folder)

        def execute_trials(*ignored):
            (folder / "trials.parquet").touch()
            return trials(scores[:2], "sequential") + trials(scores[2:], first=2)

        monkeypatch.setattr(tuning, "execute_trials", execute_trials)
        console = Console(file=io.StringIO())
        return execute_tuning(search, console=console, watch=nullcontext())

    return run


def test_every_method_takes_its_best_trial_and_all_are_written_down(execute, tmp_path):
    chosen = execute([0.4, 0.3, None, 0.2])
    assert (chosen["sequential"].chosen, chosen["agcl"].chosen) == (0, 1)
    written = json.loads((tmp_path / "storage" / "tuning" / "tuning.json").read_text())
    assert [trial["score"] for trial in written["agcl"]["trials"]] == [None, 0.2]
    assert written["agcl"]["settings"] == ["training.learning_rate=3.00e-03"]


def test_a_method_without_a_finished_trial_is_named_and_fails_the_run_in_mlflow(
    execute, monkeypatch
):
    ended = []
    monkeypatch.setattr(Mirror, "finish", lambda mirror, files, error: ended.append(error))
    with pytest.raises(Failed, match="method agcl: no trial reached the last task") as failed:
        execute([0.4, 0.3, None, None])
    execute([0.4, 0.3, 0.1, None])
    assert ended == [str(failed.value), ""]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_trials_of_all_methods_run_together_and_a_failed_one_ends_no_other(
    finished, load, copy_stages, tmp_path, monkeypatch
):
    """On Ray. The first task at a rate that diverges fails once for both methods, and in each."""
    monkeypatch.setattr(tuning, "candidates", lambda config, trials: [{RATE: 1e30}, {}])
    copy_stages(finished.storage, tmp_path / "storage", ("tokenizer", "prepare"))
    folder = tmp_path / "storage" / "tiny-compare" / "tuning"
    search = open_tuning(
        lambda more, method: load(["training.epochs=1", *more], method),
        ["sequential", "agcl"],
        2,
        folder,
    )
    observed = []
    watch = nullcontext(observed.append)
    chosen = execute_tuning(search, console=Console(file=io.StringIO()), watch=watch)
    assert [best.chosen for best in chosen.values()] == [1, 1]
    rows = pq.read_table(folder / "trials.parquet").to_pylist()
    assert [row["state"] for row in rows] == ["failed", "finished"] * 2
    assert [row["method"] for row in rows] == ["sequential"] * 2 + ["agcl"] * 2
    for row in rows[::2]:
        assert row["reason"].startswith("stage train/1-harbour: loss")
    assert (folder / "trials" / "agcl-0" / "error.log").is_file()

    client = MlflowClient(search.config.storage.tracking_uri)
    (experiment,) = [e for e in client.search_experiments() if e.name == "agcl"]
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if run.data.tags["kind"] == "search"]
    children = {r.info.run_name: r for r in runs if r.data.tags["kind"] == "trial"}
    assert sorted(children) == ["agcl-0", "agcl-1", "sequential-0", "sequential-1"]
    statuses = [children[name].info.status for name in sorted(children)]
    assert statuses == ["FAILED", "FINISHED"] * 2
    above = {run.data.tags["mlflow.parentRunId"] for run in children.values()}
    assert above == {parent.info.run_id}
    assert {file.path for file in client.list_artifacts(parent.info.run_id)} == {
        "trials.parquet",
        "tuning.json",
    }
