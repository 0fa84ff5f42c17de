"""MLflow that is silent, locked or killed: the run goes on, and its record is whole afterwards."""

import io
import json
import socket
import sqlite3
import subprocess
import sys
import time
from contextlib import closing

import mlflow
import pytest
from rich.console import Console

from agcl.errors import InputError
from pipeline import recorder, tracking
from pipeline.recorder import connect, open_recording
from pipeline.run import open_folder, open_run
from pipeline.session import run_works
from pipeline.stages.context import Context

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


class Recorded:
    """A tiny run whose stages run in this process, and what MLflow holds of it."""

    def __init__(self, config):
        self.run, self.said = open_run(config), io.StringIO()
        self.console = Console(file=self.said, width=60)

    def open(self):
        self.recording = open_recording(
            connect(self.run.config, self.console),
            self.run.folder,
            "tiny",
            self.console,
            kind=None,
        )
        open_folder(self.run)
        self.recording.add("tiny", self.run)
        return self.recording

    def compute(self, *kinds):
        """Run the stages of some kinds, observed."""
        works = [work for name, work in self.run.works.items() if name.startswith(kinds)]
        run_works(works, Context(), self.recording.observe)

    def finish(self):
        report = self.run.works["report"].folder / "metrics.json"
        metrics = json.loads(report.read_text())
        self.recording.finish_run("tiny", metrics, {"metrics.json": report})

    def check_whole(self):
        """Every stage once and finished, and every number as in the artifacts, once."""
        client = mlflow.MlflowClient(tracking.default_uri(self.run.config.storage))
        parent = json.loads((self.run.folder / "mlflow.json").read_text())["run_id"]
        experiment = client.get_experiment_by_name("agcl").experiment_id
        stages = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'")
        assert sorted(run.info.run_name for run in stages) == sorted(self.run.works)
        assert {run.info.status for run in stages} == {"FINISHED"}
        assert client.get_run(parent).info.status == "FINISHED"
        for run in stages:
            if run.info.run_name.startswith(("train", "pretrain")):
                log = self.run.works[run.info.run_name].folder / "log.jsonl"
                lines = [json.loads(line) for line in log.read_text().splitlines()]
                assert len(lines) > 1
                points = client.get_metric_history(run.info.run_id, "loss")
                found = sorted((point.step, point.value) for point in points)
                assert found == [(line["step"], line["loss"]) for line in lines]
        metrics = json.loads((self.run.works["report"].folder / "metrics.json").read_text())
        for column, task in enumerate(metrics["tasks"]):
            points = client.get_metric_history(parent, f"memorization/{task}")
            rows = metrics["evaluation_sets"]["memorization"]["accuracy_matrix"]
            found = sorted((point.step, point.value) for point in points)
            assert found == [(index, row[column]) for index, row in enumerate(rows)]
        (final,) = client.get_metric_history(parent, "average_performance")
        assert final.value == metrics["average_performance"]


@pytest.fixture
def recorded(finished, tiny_config, copy_stages, tmp_path):
    """A run of which the first half is there already."""
    storage = tmp_path / "storage"
    storage.mkdir()
    first = ("tokenizer", "prepare", "pretrain", "evaluate-0", "train-1", "evaluate-1")
    copy_stages(finished.storage, storage, first)
    return Recorded(tiny_config(storage, method="sequential"))


def test_what_is_sent_again_is_there_once(recorded):
    recorded.open()
    recorded.compute("train")
    recorded.open()  # As after a kill: the stage's run is open, and its stage complete.
    recorded.compute("evaluate", "report")
    recorded.finish()
    recorded.open()
    recorded.finish()
    recorded.check_whole()
    assert "warning" not in recorded.said.getvalue()


def test_a_database_that_fails_for_a_while_misses_nothing(recorded, monkeypatch):
    monkeypatch.setattr(recorder, "_SECONDS_BETWEEN_TRIES", 0.0)
    recorded.open()
    file = recorded.run.config.storage / "mlflow.db"
    with closing(sqlite3.connect(file)) as database:
        database.execute("ALTER TABLE tags RENAME TO gone")
        recorded.compute("train")
        (said,) = [line for line in recorded.said.getvalue().splitlines() if "warning" in line]
        assert "no such table: tags" in said
        assert "goes on unrecorded" in said
        assert recorded.recording.run_of("tiny") is None
        database.execute("ALTER TABLE gone RENAME TO tags")
    recorded.compute("evaluate", "report")
    assert "MLflow is back" in recorded.said.getvalue()
    recorded.finish()
    recorded.check_whole()


def test_a_silent_server_is_one_warning_within_seconds(tiny_config, tmp_path):
    with socket.socket() as free:  # Bound and not listening: connections are refused.
        free.bind(("127.0.0.1", 0))
        uri = f"http://someone:secret@127.0.0.1:{free.getsockname()[1]}"
        said, started = io.StringIO(), time.monotonic()
        config = tiny_config(tmp_path / "storage", f"tracking.uri={uri}")
        assert connect(config, Console(file=said, width=60)) is None
    assert time.monotonic() - started < 30
    (line,) = said.getvalue().splitlines()
    assert "no answer" in line
    assert "goes on unrecorded" in line
    assert "secret" not in line


@pytest.mark.parametrize("uri", ["magic://here", "sqlite:////no/such/folder/x.db"])
def test_a_bad_uri_ends_before_any_work(tiny_config, tmp_path, uri):
    config = tiny_config(tmp_path / "storage", f"tracking.uri={uri}")
    with pytest.raises(InputError, match=r"^tracking\.uri: "):
        connect(config, Console(file=io.StringIO()))
    assert not config.storage.exists()


def test_a_database_whose_making_was_killed_is_made_again(tmp_path):
    storage = tmp_path / "storage"
    code = "import sys; from pathlib import Path; from pipeline.tracking import Tracker\n"
    code += "Tracker(Path(sys.argv[1]), None)"
    maker = subprocess.Popen([sys.executable, "-c", code, storage])
    deadline = time.monotonic() + 60
    while not (storage / "mlflow.db.part").exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    maker.kill()
    maker.wait()
    assert not (storage / "mlflow.db").exists()
    one, two = (subprocess.Popen([sys.executable, "-c", code, storage]) for _ in range(2))
    assert (one.wait(), two.wait()) == (0, 0)
    assert [file.name for file in storage.iterdir()] == ["mlflow.db"]
