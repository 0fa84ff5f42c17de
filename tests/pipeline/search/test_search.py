"""Trials as runs of the DAG: what they score, what they share, and what a search leaves behind."""

import io
import json
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient
from ray import tune
from ray.tune.search import ConcurrencyLimiter
from rich.console import Console

from agcl.errors import InputError
from pipeline.config import loading
from pipeline.config.model import Model
from pipeline.errors import StageFailed
from pipeline.execution.session import run_stages
from pipeline.plan.plan import plan
from pipeline.results.files import BEST_CONFIG, CONFIG_FILE, SEARCH_FILE
from pipeline.results.run_folder import open_folder
from pipeline.run import open_run
from pipeline.search import trial as trials
from pipeline.search.best import best_run
from pipeline.search.engine import Points, Search, Watch, _trainable
from pipeline.search.search import (
    _raise_common,
    example_runs,
    execute_trials,
    in_several,
    mirrored_search,
    only_validation,
    open_search,
)
from pipeline.search.trial import run_trial
from pipeline.stages.context import Context
from pipeline.stages.files import PREDICTIONS
from pipeline.storage import artifact
from pipeline.storage.object_store import StoreFailed

ROOT = Path(__file__).parents[3]
SPACE = (
    "search.space={protect.0.energy: {type: uniform, low: 0.5, high: 0.95}, "
    "protect.0.weighting: {type: choice, values: [relevance, uniform]}}"
)
WHOLE = "training.micro_batch_size=null"
"""Batches in one pass, in half the time."""


@pytest.fixture
def in_process(monkeypatch):
    """Runs a search without Ray: the trials of a round one after the other, in this process.

    Gives the trials, the artifacts that were computed and what was reported to Tune.
    """
    played = Played()
    monkeypatch.setattr(tune, "report", lambda report: played.report(report))

    def watched(stages, context, emit):
        def see(records):
            played.computed += [r["artifact"] for r in records if r.get("state") == "started"]
            emit(records)

        context.ray_data = False
        run_stages(stages, context, see)

    monkeypatch.setattr("pipeline.search.trial.run_stages", watched)

    def run(search):
        examples = example_runs(search)
        shared = in_several(examples)
        for example in examples.values():
            stages = [s for s in example.resolved.values() if s.folder.name in shared]
            watched(stages, Context(), lambda records: None)
        num_tasks = len(plan(search.config).tasks)
        size = search.config.search.round
        points = ConcurrencyLimiter(Points(search, num_tasks), size, batch=True)
        watch = Watch(search, num_tasks, lambda trial: None)
        for first in range(0, search.num_trials, size):
            ids = [str(n) for n in range(first, min(first + size, search.num_trials))]
            trials = {
                trial_id: SimpleNamespace(config=points.suggest(trial_id)) for trial_id in ids
            }
            for trial_id, trial in trials.items():
                play(trial_id, trial, shared, points, watch, search)
        return list(watch.trials.values())

    def play(trial_id, trial, shared, points, watch, search):
        def report(scores):
            played.reported.append(scores)
            points.on_trial_result(trial_id, {**scores, "training_iteration": scores.get("task")})
            watch.on_trial_result(0, [], trial, scores)

        played.report = report
        watch.on_trial_start(0, [], trial)
        run_trial(search.run_of(**trial.config["trial"]), shared)
        points.on_trial_complete(trial_id, played.reported[-1])
        watch.on_trial_complete(0, [], trial)

    played.run = run
    return played


@dataclass
class Played:
    computed: list = field(default_factory=list)
    reported: list = field(default_factory=list)


@pytest.fixture
def search(tiny_config, tmp_path):
    """Opens a search on the tiny config."""

    def make(num_trials, *settings, resume=False):
        config = tiny_config(tmp_path / "storage", SPACE, WHOLE, *settings)
        return open_search(config, num_trials, resume=resume)

    return make


def scored(search, trial):
    """The rows that a trial's evaluate stages scored."""
    resolved = search.run_of(trial.number, trial.settings).resolved
    stages = [stage for name, stage in resolved.items() if name.startswith("evaluate/")]
    assert len(stages) == 3
    files = [stage.folder / PREDICTIONS for stage in stages]
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def test_trials_score_validation_rows_only_and_report_after_every_task(search, in_process):
    of = search(2)
    found = in_process.run(of)
    assert [trial.state for trial in found] == ["finished", "finished"]
    rows = [row for trial in found for row in scored(of, trial)]
    assert rows
    assert all(row["position"] < 0.3 for row in rows)
    averages = [progress.average for trial in found for progress in trial.progress]
    assert [(r["task"], r["average"]) for r in in_process.reported] == list(
        zip([1, 2, 1, 2], averages, strict=True)
    )


@pytest.mark.slow
def test_an_extra_trial_computes_only_what_its_settings_change(search, in_process):
    first = in_process.run(search(1))
    computed = list(in_process.computed)
    assert sum(name.startswith(("prepare-", "pretrain", "tokenizer")) for name in computed) == 5
    in_process.computed.clear()
    of = search(2)
    again, extra = in_process.run(of)
    assert again == first[0]
    kinds = [name.rpartition("-")[0] for name in in_process.computed]
    # The importance of the last task protects nothing.
    assert kinds in (
        ["train-2-valley", "evaluate-2-valley"],
        # A point of the other weighting has other moments too.
        ["attribute-1-harbour", "train-2-valley", "evaluate-2-valley"],
    )
    shared = in_several(example_runs(of))
    own = {s.folder for s in of.run_of(1, extra.settings).resolved.values()}
    seconds = [artifact.read_manifest(f)["seconds"] for f in own if f.name not in shared]
    assert extra.seconds == pytest.approx(sum(seconds), abs=0.01)
    # The same search again finds everything in the storage, as does one of another name.
    in_process.computed.clear()
    for same in (search(2), search(2, "name=other")):
        assert in_process.run(same) == [again, extra]
    assert in_process.computed == []


@pytest.mark.slow
def test_a_stage_that_fails_fails_its_trial_and_says_why(search, in_process):
    of = search(3, "search.space={training.learning_rate: {type: choice, values: [1e+9, 1e-3]}}")
    found = in_process.run(of)
    failed = [trial for trial in found if trial.settings["training.learning_rate"] == 1e9]
    assert 0 < len(failed) < 3
    for trial in failed:
        assert trial.state == "failed"
        assert trial.reason.startswith("stage train/1-harbour: loss")
        assert "NonFiniteLoss" in (of.run_folder(trial.number) / "error.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["joint", pytest.param("solo", marks=pytest.mark.slow)])
def test_a_bound_has_the_average_of_its_report(
    method, tiny_config, tmp_path, in_process, monkeypatch
):
    """`compare --trials` tunes these too, and a search refuses them."""
    settings = ("training.epochs=4", WHOLE, "evaluation.validation=0.3")
    config = tiny_config(tmp_path / "storage", *settings, method=method)
    known = {f"{method}-0": ({"method": method}, only_validation(config))}
    search = Search(only_validation(config), tmp_path / "tuning", 1, known=known)
    reports = []
    in_process.report = reports.append
    run_trial(search.run_of(0, {"method": method}), set())
    assert [report["task"] for report in reports] == [1, 2]
    # Another process may score the last task, of which this one gets no record.
    trial, computed = search.run_of(0, {"method": method}), list(reports)
    last = [each for name, each in trial.resolved.items() if name.startswith("evaluate/")][-1]
    shutil.rmtree(last.folder)
    reports.clear()
    with monkeypatch.context() as patch:
        quiet = partial(run_stages, [last], Context(), lambda records: None)
        patch.setattr("pipeline.search.trial._run_stages", lambda run, observe: quiet())
        run_trial(trial, set())
    assert [(r["task"], r["average"]) for r in reports] == [
        (r["task"], r["average"]) for r in computed
    ]
    run = open_run(config)
    run_stages(list(run.resolved.values()), Context(ray_data=False), lambda records: None)
    metrics = json.loads(run.resolved["report"].read("metrics.json"))
    sets = metrics["validation"].values()
    assert reports[-1]["average"] == pytest.approx(fmean(s["average_performance"] for s in sets))
    assert reports[-1]["learned"] == pytest.approx(fmean(s["learning_accuracy"] for s in sets))


def write_tasks(folder, changed=False):
    """Three splits of two tasks; `changed` gives every test row another answer."""
    folder.mkdir()
    for task in ("one", "two"):
        (folder / task).mkdir()
        for split, people in (("train", range(8)), ("test", range(6)), ("validation", range(3, 8))):
            rows = [
                {
                    "prompt": f"Where does {task} number {i} live?",
                    "answer": " nowhere" if changed and split == "test" else f" in {task}{i % 4}",
                }
                for i in people
            ]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / task / f"{split}.jsonl").write_text(text)
    return folder


def test_changing_every_test_answer_changes_no_choice(tiny_config, tmp_path, in_process):
    found = []
    for changed in (False, True):
        data = write_tasks(tmp_path / f"data-{changed}", changed)
        tasks = f"tasks={{format: jsonl, sequence: [{{path: {data}/one}}, {{path: {data}/two}}]}}"
        config = tiny_config(
            tmp_path / f"storage-{changed}",
            tasks,
            SPACE,
            WHOLE,
            "search.round=2",
            "importance.correct_only=false",
        )
        search = open_search(config, 3, resume=False)
        tried = in_process.run(search)
        found.append([trial.settings | {"at": trial.progress} for trial in tried])
        best = trials.best(tried)
        sets = {(row["task"], row["evaluation_set"]) for row in scored(search, best)}
        assert sets == {("one", "validation"), ("two", "validation"), ("base", "memorization")}
        run = best_run(search, best)
        run_stages(list(run.resolved.values()), Context(ray_data=False), lambda records: None)
        metrics = json.loads((run.resolved["report"].folder / "metrics.json").read_text())
        final = metrics["evaluation_sets"]["test"]["average_performance"]
        assert (final == 0) == changed, final
        assert metrics["validation"]["validation"]["average_performance"] == pytest.approx(
            best.last.average
        )
    assert found[0] == found[1]
    assert len({str(trial) for trial in found[0]}) > 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("files", "scored_set", "share"),
    [
        (("train",), "memorization", 0.5),
        pytest.param(("train", "test"), "test", 0.5, marks=pytest.mark.slow),
        pytest.param(("train", "validation"), "validation", None, marks=pytest.mark.slow),
    ],
)
def test_tasks_scored_on_what_they_train_on_train_all_of_it(
    tiny_config, tmp_path, files, scored_set, share
):
    """Facts that were set apart from training would be answered by no trial."""
    people = [
        {"prompt": f"Where does number {i} live?", "answer": f" in {i % 4}"} for i in range(8)
    ]
    for split in files:
        lines = [json.dumps(row) + "\n" for row in people]
        (tmp_path / f"{split}.jsonl").write_text("".join(lines[:: -1 if split == "test" else 1]))
    tasks = f"tasks={{format: jsonl, sequence: [{{name: one, path: {tmp_path}}}]}}"
    options = [tasks, WHOLE, "training.epochs=40", f"evaluation.validation={share or 0.3}"]
    config = only_validation(tiny_config(tmp_path / "storage", *options, method="sequential"))
    resolved = open_run(config).resolved
    run_stages(list(resolved.values()), Context(ray_data=False), lambda records: None)
    summary = json.loads(resolved["prepare/one"].read("summary.json"))
    assert summary["splits"]["train"]["rows"] == 8
    rows = pq.read_table(resolved["evaluate/1-one"].folder / PREDICTIONS).to_pylist()
    rows = [row for row in rows if row["task"] == "one"]
    assert {row["evaluation_set"] for row in rows} == {scored_set}
    assert fmean(row["score"] for row in rows) > 0.5
    if share:
        assert 0 < len(rows) < 8
        assert all(row["position"] < share for row in rows)


def test_another_winner_of_more_trials_takes_the_place_of_the_earlier_one(search):
    of = search(3)
    one, other = (
        trials.Trial(n, {"training.learning_rate": rate}) for n, rate in enumerate((1e-3, 1e-4))
    )
    for winner in (one, one, other, one):
        run = best_run(of, winner)
        open_folder(run)
        artifact.write_text(of.folder / BEST_CONFIG, loading.dump(run.config))
        stored = loading.load(run.folder / CONFIG_FILE)
        assert stored.training.learning_rate == winner.settings["training.learning_rate"]


def test_the_same_winner_on_other_machines_keeps_its_folder(search):
    """Its MLflow run, and the version of its model that is registered."""
    winner = trials.Trial(0, {"training.learning_rate": 1e-3})
    for more in ((), ("resources.cpus_per_worker=2",), ("tracking.enabled=false",)):
        of = search(3, *more)
        run = best_run(of, winner)
        assert (run.folder / CONFIG_FILE).exists() == bool(more)
        open_folder(run)
        artifact.write_text(of.folder / BEST_CONFIG, loading.dump(run.config))


@pytest.mark.parametrize(
    ("settings", "resume", "said"),
    [
        ((), True, "--resume: "),
        (("method=joint",), False, "method: joint is an upper bound"),
        (
            ("tasks.count=1", "search.objective=retained_and_learned"),
            False,
            "search.objective: one task alone",
        ),
        (
            ("search.objective=base_and_average", "model.path=TINY", "evaluation.text=null"),
            False,
            "search.objective: base_and_average needs evaluation.text",
        ),
        (
            ("search.objective=base_and_average", "protect.0.energy=0.4"),
            False,
            "search.objective: base_and_average compares with the config's own settings",
        ),
        (
            ("search.objective=base_and_average", "search.stopping=asha"),
            False,
            "search.stopping: asha could stop the config's own settings",
        ),
        (("tasks.count=0",), False, "tasks.count"),
        (("name=" + "x" * 96,), False, "name: "),  # With "-best", at the end, it is too long.
    ],
)
def test_a_search_that_cannot_be_is_refused_and_nothing_is_written(
    search, tmp_path, settings, resume, said
):
    with pytest.raises(InputError) as error:
        search(3, *settings, resume=resume)
    assert said in str(error.value)
    assert not (tmp_path / "storage").exists()


def test_bad_input_within_a_trial_fails_it_with_its_line_and_is_not_retried(search, in_process):
    of = search(1, "tracking.enabled=false")
    run = of.run_of(0, {})
    damaged = run.resolved["evaluate/0-base"].folder
    damaged.mkdir(parents=True)
    in_process.report = in_process.reported.append
    _trainable(of, set())({"trial": {"number": 0, "settings": {}}})
    (reported,) = in_process.reported
    assert reported["reason"].startswith(f"artifact {damaged} is corrupt: it has no manifest")
    assert "CorruptArtifact" in reported["traceback"]


def test_a_store_that_fails_a_trial_is_its_reason(search, in_process, monkeypatch):
    def unreachable(run, shared):
        raise StoreFailed("storage: s3://there: no answer")

    monkeypatch.setattr("pipeline.search.engine.run_trial", unreachable)
    in_process.report = in_process.reported.append
    of = search(1)
    of.config.storage.root.mkdir(exist_ok=True)
    _trainable(of, set())({"trial": {"number": 0, "settings": {}}})
    (reported,) = in_process.reported
    assert reported["reason"] == "storage: s3://there: no answer"
    assert "StoreFailed" in reported["traceback"]


def test_a_trial_on_a_node_without_the_storage_is_refused(search, in_process, tmp_path):
    of = search(1)
    shutil.rmtree(tmp_path / "storage", ignore_errors=True)
    in_process.report = in_process.reported.append
    _trainable(of, set())({"trial": {"number": 0, "settings": {}}})
    (reported,) = in_process.reported
    assert f"does not see {tmp_path / 'storage'} of the driver's node" in reported["reason"]
    assert not (tmp_path / "storage").exists()


def test_a_trial_gets_the_model_before_it_plans(monkeypatch):
    """Its node's cache may lack what the driver's has."""
    model, did = Model(path="org/tiny", revision=f"main@{'a' * 40}"), []
    monkeypatch.setattr(
        "pipeline.config.hub.fetch", lambda *named, weights: did.append((*named, weights))
    )
    monkeypatch.setattr("pipeline.search.engine.run_trial", lambda run, shared: did.append(run))
    config = SimpleNamespace(model=model, storage=SimpleNamespace(shared=False))
    search = SimpleNamespace(config=config, run_of=lambda **trial: "run")
    _trainable(search, set())({"trial": {"number": 0, "settings": {}}})
    assert did == [("org/tiny", "a" * 40, False), "run"]


def test_a_shared_stage_that_finds_the_disk_full_keeps_its_line(search, tmp_path):
    run = search(1).run_of(0, {})
    (tmp_path / "error.log.part").symlink_to("/dev/full")
    failure = StageFailed("evaluate/0-base", "no space left on device for /x", "traceback")
    with pytest.raises(StageFailed, match="no space left on device for /x"):
        _raise_common([failure], {"one": run}, tmp_path)


@pytest.mark.parametrize(
    ("setting", "outcome"), [("seed=0", EOFError), ("search.round=3", InputError)]
)
def test_of_two_searches_at_once_the_second_waits_and_never_replaces_another(
    search, monkeypatch, setting, outcome
):
    def begins(search):
        raise EOFError

    monkeypatch.setattr("pipeline.search.search.example_runs", begins)
    first, second = (search(2, "tracking.enabled=false", each) for each in ("seed=0", setting))
    console = Console(file=io.StringIO(), width=300)

    def start():
        with mirrored_search(second, console) as mirror:
            execute_trials(second, mirror, console, nullcontext())

    with ThreadPoolExecutor() as pool:
        with mirrored_search(first, console):
            artifact.write_text(first.folder / SEARCH_FILE, loading.dump(first.config))
            (first.folder / ".ray-tune").mkdir()
            waiting = pool.submit(start)
            time.sleep(0.2)
            assert not waiting.done()
            assert f"waiting for another command that works on {first.folder}" in (
                console.file.getvalue()
            )
            assert (first.folder / ".ray-tune").exists()
        error = waiting.exception(timeout=30)
    assert isinstance(error, outcome)
    if outcome is InputError:
        assert "holds a search with search.round=4, not 3" in str(error)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_search_resumes_to_the_trials_and_the_winner_of_an_undisturbed_one(
    search, tmp_path, in_process, copy_stages
):
    (tmp_path / "text").write_text("Rivers run to the sea. " * 20)
    settings = ("search.round=2", f"evaluation.text={tmp_path / 'text'}")
    of = search(3, *settings)
    undisturbed = in_process.run(search(3, f"storage={tmp_path / 'other'}", *settings))
    copy_stages(tmp_path / "other", of.config.storage.root, ("tokenizer", "prepare"))
    file = tmp_path / "config.yaml"
    file.write_text(loading.dump(tuned(of.config)))
    command = [sys.executable, "-m", "jobs", "search", str(file), "--trials", "3"]
    # Output goes to a file: what Ray leaves behind would hold a pipe open.
    with (tmp_path / "out").open("w") as out:
        first = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out)
        wait_for(lambda: "running, task 1" in (tmp_path / "out").read_text())
        first.kill()
        assert first.wait() == -signal.SIGKILL
        stages = [f.parent for f in (of.config.storage.root / "stages").glob("*/manifest.json")]
        before = {
            path: artifact.read_manifest(path)["started"]
            for path in stages
            if path.suffix != ".part"
        }
        second = subprocess.run(
            [*command, "--resume"], cwd=ROOT, stdout=out, stderr=out, timeout=300, check=False
        )
    said = (tmp_path / "out").read_text()
    assert second.returncode == 0, said
    best = trials.best(undisturbed)
    assert f"best is trial {best.number}:" in said

    # Finished stages were not computed again, and the winner's config finds everything there.
    assert before
    for stage, started in before.items():
        assert artifact.read_manifest(stage)["started"] == started
    run = open_run(loading.load(of.folder / "best.yaml"))
    assert all(stage.is_complete() for stage in run.resolved.values())
    assert run.config.protect[0].energy == best.settings["protect.0.energy"]
    table = trials.table(undisturbed).drop(["seconds"])
    assert pq.read_table(of.folder / "trials.parquet").drop(["seconds"]) == table
    for name in (
        "optimization-history.png",
        "slices.png",
        "pareto-front.png",
        "pareto-front-base.png",
    ):
        assert (of.folder / "figures" / name).read_bytes()[:4] == b"\x89PNG"
    check_mlflow(of.config.storage.tracking_uri, best)

    with pytest.raises(InputError, match=r"holds a search with search\.round=2, not 3"):
        search(3, *settings, "search.round=3", resume=True)


def tuned(config):
    """The config that a search's trials were made from."""
    return loading.changed(config, {"evaluation.rows": "all", "evaluation.validation": 0})


def wait_for(condition):
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def check_mlflow(uri, best):
    """One run for the search, below it the trials with their own stages, and the winner's."""
    client = MlflowClient(uri)
    (experiment,) = [e for e in client.search_experiments() if e.name == "agcl"]
    by_id = {r.info.run_id: r for r in client.search_runs([experiment.experiment_id])}
    kinds = {}
    for each in by_id.values():
        above = by_id.get(each.data.tags.get("mlflow.parentRunId"))
        key = (each.data.tags["kind"], above and above.data.tags["kind"])
        kinds.setdefault(key, []).append(each)
    (parent,) = kinds[("search", None)]
    assert [r.info.run_name for r in kinds[("sequence", "search")]] == ["best"]
    files = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert {"trials.parquet", "best.yaml", "search.yaml", "figures"} <= files
    assert parent.data.metrics["best_average"] == best.last.average
    of_trials = {r.info.run_name: r for r in kinds[("trial", "search")]}
    assert sorted(of_trials) == [f"trial-{number}" for number in range(3)]
    of_best = of_trials[f"trial-{best.number}"].data.metrics
    assert of_best["average"] == best.last.average
    assert of_best["base_kept"] == best.last.base_kept is not None
    assert all(run.data.metrics["base/text_loss"] > 0 for run in of_trials.values())
    stages = {r.data.tags["stage"] for r in kinds[("stage", "trial")]}
    assert "train" in stages
    assert stages <= {"train", "attribute", "evaluate"}
    open_runs = [r for r in by_id.values() if r.info.status != "FINISHED"]
    assert not open_runs, [(r.info.run_name, r.info.status) for r in open_runs]
