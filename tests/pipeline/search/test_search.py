"""Trials as runs of the DAG: what they score, what they share, and what a search leaves behind."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient
from ray import tune

from agcl.errors import InputError
from pipeline.config import loading
from pipeline.execution.session import run_stages
from pipeline.results.run_folder import CONFIG_FILE, open_folder
from pipeline.run import open_run
from pipeline.search import trial as trials
from pipeline.search.rounds import Rounds
from pipeline.search.search import run_trial, shared_stages
from pipeline.search.search_run import BEST_CONFIG, best_run, open_search
from pipeline.stages.context import Context
from pipeline.stages.evaluate import is_for_validation
from pipeline.stages.files import PREDICTIONS
from pipeline.storage import artifact
from pipeline.tracking.client import default_uri

ROOT = Path(__file__).parents[3]
SPACE = (
    "search.space={protect.0.energy: {type: uniform, low: 0.5, high: 0.95}, "
    "protect.0.weighting: {type: choice, values: [relevance, uniform]}}"
)


@pytest.fixture
def in_process(monkeypatch):
    """Runs a search without Ray: trials one after the other in this process.

    Gives the trials, the stages that were computed and what was reported to Tune.
    """
    played = Played()
    monkeypatch.setattr(tune, "report", played.reported.append)
    monkeypatch.setattr(
        "pipeline.search.search.run_stages", lambda works, *rest: play(works, *rest)
    )

    def play(works, context, emit):
        def watched(records):
            played.computed += [r["artifact"] for r in records if r.get("state") == "started"]
            emit(records)

        run_stages(works, context, watched)

    def run(search, stop_after=None):
        shared = shared_stages(search)
        works = search.run_of(trials.Trial(0, {})).resolved
        play([works[stage.name] for stage in shared], Context(ray_data=False), lambda records: None)
        rounds = Rounds(search, 1, lambda trial: None)
        number = 0
        while isinstance(found := rounds.suggest(f"id{number}"), dict):
            if number == stop_after:
                return rounds.all()
            run_trial(search, found["number"])
            rounds.on_trial_complete(f"id{number}", {})
            number += 1
        return rounds.all()

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
        config = tiny_config(tmp_path / "storage", SPACE, *settings)
        return open_search(config, num_trials, resume=resume)

    return make


def scored(search, trial):
    """The rows that a trial's evaluate stages scored."""
    works = search.run_of(trial).resolved
    files = [w.folder / PREDICTIONS for name, w in works.items() if name.startswith("evaluate/")]
    assert len(files) == 3
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def test_trials_score_validation_rows_only_and_report_after_every_task(search, in_process):
    of = search(2)
    found = in_process.run(of)
    assert [trial.state for trial in found] == ["finished", "finished"]
    rows = [row for trial in found for row in scored(of, trial)]
    assert rows
    assert all(is_for_validation(row["prompt"], row["answer"], share=0.3) for row in rows)
    averages = [[progress.average for progress in trial.progress] for trial in found]
    assert in_process.reported == [
        {"task": task, "average": averages[trial][task - 1]} for trial in (0, 1) for task in (1, 2)
    ]


def test_an_extra_trial_computes_only_what_its_settings_change(search, in_process):
    in_process.run(search(1))
    first = list(in_process.computed)
    assert sum(name.startswith(("prepare-", "pretrain", "tokenizer")) for name in first) == 5
    in_process.computed.clear()
    in_process.run(search(2))
    kinds = [name.rpartition("-")[0] for name in in_process.computed]
    # The importance of the last task protects nothing.
    assert kinds in (
        ["train-2-valley", "evaluate-2-valley"],
        # A point of the other weighting has other moments too.
        ["attribute-1-harbour", "train-2-valley", "evaluate-2-valley"],
    )
    of = search(2)
    works = of.run_of(trials.load(of.folder_of(1))).resolved
    assert trials.load(of.folder_of(1)).seconds == pytest.approx(
        sum(
            artifact.read_manifest(work.folder)["seconds"]
            for name, work in works.items()
            if name not in {stage.name for stage in shared_stages(of)}
        ),
        abs=0.01,
    )


def test_a_trial_that_was_interrupted_goes_on_at_its_first_unfinished_stage(search, in_process):
    whole = in_process.run(search(2, "name=whole"))
    in_process.run(search(2), stop_after=1)  # All stages are there: another name shares them.
    in_process.computed.clear()
    assert [t.settings for t in in_process.run(search(2))] == [t.settings for t in whole]
    assert in_process.computed == []


def test_a_stage_that_fails_fails_its_trial_and_says_why(search, in_process):
    of = search(3, "search.space={training.learning_rate: {type: choice, values: [1e+9, 1e-3]}}")
    found = in_process.run(of)
    failed = [trial for trial in found if trial.settings["training.learning_rate"] == 1e9]
    assert failed
    assert len(failed) < 3
    for trial in failed:
        assert trial.state == "failed"
        assert trial.reason.startswith("stage train/1-harbour: loss")
        assert "NonFiniteLoss" in (of.folder_of(trial.number) / "error.log").read_text()


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
            "search.round=2",
            "importance.correct_only=false",
        )
        search = open_search(config, 5, resume=False)
        found.append([trial.settings | {"at": trial.progress} for trial in in_process.run(search)])
        best = trials.best([trials.load(search.folder_of(n)) for n in range(5)])
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


@pytest.mark.parametrize(
    ("settings", "resume", "said"),
    [
        ((), True, "--resume: "),
        (("method=joint",), False, "method: joint is a bound"),
        (
            ("tasks.count=1", "search.objective=retained_and_learned"),
            False,
            "search.objective: one task alone",
        ),
        (("tasks.count=0",), False, "tasks.count"),
    ],
)
def test_a_search_that_cannot_be_is_refused_and_nothing_is_written(
    search, tmp_path, settings, resume, said
):
    with pytest.raises(InputError) as error:
        search(3, *settings, resume=resume)
    assert said in str(error.value)
    assert not (tmp_path / "storage").exists()


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
        wait_for(lambda: any((trials.load(of.folder_of(n)) or NONE).progress for n in (0, 1)))
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
    after = [trials.load(of.folder_of(n)) for n in range(3)]
    assert [(t.settings, t.state, t.progress) for t in after] == [
        (t.settings, t.state, t.progress) for t in undisturbed
    ]
    best = trials.best(undisturbed)
    assert f"best is trial {best.number}:" in said

    # Finished stages were not computed again, and the winner's config finds everything there.
    assert before
    for stage, started in before.items():
        assert artifact.read_manifest(stage)["started"] == started
    run = open_run(loading.load(of.folder / "best.yaml"))
    assert all(work.is_complete() for work in run.resolved.values())
    assert run.config.protect[0].energy == best.settings["protect.0.energy"]
    rows = pq.read_table(of.folder / "trials.parquet").to_pylist()
    assert [row["average"] for row in rows] == [trial.last.average for trial in undisturbed]
    for name in ("parallel-coordinates.png", "pareto-front.png"):
        assert (of.folder / "figures" / name).read_bytes()[:4] == b"\x89PNG"
    check_mlflow(tmp_path / "storage", best)

    with pytest.raises(InputError, match=r"another 'search' section"):
        search(3, *settings, "search.round=3", resume=True)


NONE = trials.Trial(0, {})


def tuned(config):
    """The config that a search's trials were made from."""
    return loading.changed(config, {"evaluation.rows": "all", "evaluation.validation": 0})


def wait_for(condition):
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def check_mlflow(storage, best):
    """One run for the search, below it the trials with their own stages, and the winner's."""
    client = MlflowClient(default_uri(storage))
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
    assert of_trials[f"trial-{best.number}"].data.metrics["average"] == best.last.average
    assert all(run.data.metrics["text_loss"] > 0 for run in of_trials.values())
    stages = {r.data.tags["stage"] for r in kinds[("stage", "trial")]}
    assert "train" in stages
    assert stages <= {"train", "attribute", "evaluate"}
    open_runs = [r for r in by_id.values() if r.info.status != "FINISHED"]
    assert not open_runs, [(r.info.run_name, r.info.status) for r in open_runs]
