"""MLflow that is silent, locked or killed: the run goes on, and its record is whole afterwards."""

import io
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from contextlib import closing, suppress

import pytest
from reference.record import check_whole
from rich.console import Console

from agcl.errors import InputError
from pipeline.config import loading
from pipeline.execution.session import run_stages
from pipeline.results.run_folder import open_folder
from pipeline.run import open_run
from pipeline.stages.context import Context
from pipeline.storage.artifact import write_json
from pipeline.tracking import client as tracking
from pipeline.tracking import recorder
from pipeline.tracking.recorder import connect, open_recording

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
        works = [work for name, work in self.run.resolved.items() if name.startswith(kinds)]
        run_stages(works, Context(), self.recording.observe)

    def finish(self):
        report = self.run.resolved["report"].folder / "metrics.json"
        metrics = json.loads(report.read_text())
        self.recording.finish_run("tiny", metrics, {"metrics.json": report})


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
    check_whole(tracking.default_uri(recorded.run.config.storage), recorded.run)
    assert "warning" not in recorded.said.getvalue()


@pytest.mark.parametrize("written", [0, 1])
def test_a_run_whose_process_was_killed_while_making_it_is_made_once(
    tmp_path, monkeypatch, written
):
    """Killed before its run's file was written the first time, or the second."""
    tracker = tracking.Tracker(tmp_path, None)
    calls = []

    def killed(file, value):
        if len(calls) == written:
            raise KeyboardInterrupt
        calls.append(value)
        write_json(file, value)

    monkeypatch.setattr(tracking, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        tracker.open(tmp_path, "tiny", {"kind": "sequence"})
    monkeypatch.undo()
    first = tracker.open(tmp_path, "tiny", {"kind": "sequence"})
    tracker.end(first, "KILLED")
    assert tracker.open(tmp_path, "tiny", {"kind": "sequence"}) == first
    (found,) = tracker.client.search_runs([tracker.experiment])
    assert (found.info.run_id, found.info.status) == (first, "RUNNING")


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
    check_whole(tracking.default_uri(recorded.run.config.storage), recorded.run)


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


@pytest.mark.parametrize("uri", ["magic://here", "nowhere:5000"])
def test_a_bad_uri_ends_before_any_work(tiny_config, tmp_path, uri):
    config = tiny_config(tmp_path / "storage", f"tracking.uri={uri}")
    with pytest.raises(InputError, match=r"^tracking\.uri: "):
        connect(config, Console(file=io.StringIO()))
    assert not config.storage.exists()


def test_two_runs_make_one_database_where_a_third_was_killed_while_making_it(tmp_path):
    storage = tmp_path / "storage"
    storage.mkdir()
    with closing(sqlite3.connect(storage / "mlflow.db.part")) as half:
        half.execute("CREATE TABLE runs (half_made)")
    (storage / "mlflow.db.lock").touch()
    code = "import sys; from pathlib import Path; from pipeline.tracking.client import Tracker\n"
    code += "Tracker(Path(sys.argv[1]), None)"
    one, two = (subprocess.Popen([sys.executable, "-c", code, storage]) for _ in range(2))
    assert (one.wait(), two.wait()) == (0, 0)
    assert [file.name for file in storage.iterdir()] == ["mlflow.db"]


class Server:
    """An MLflow server that can be killed and started again."""

    def __init__(self, folder):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri, self.folder, self.process = f"http://127.0.0.1:{self.port}", folder, None

    def start(self):
        store = ["--backend-store-uri", f"sqlite:///{self.folder / 'server.db'}"]
        store += ["--artifacts-destination", str(self.folder / "artifacts")]
        place = ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *store, *place],
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + 120
        while True:
            with suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=1):
                return
            assert time.monotonic() < deadline, "the server does not answer"
            time.sleep(0.2)

    def kill(self):
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture
def server(tmp_path):
    server = Server(tmp_path)
    yield server
    server.kill()


def warnings(out):
    return [line for line in out.splitlines() if "warning" in line]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_server_that_dies_under_a_run_gets_everything_from_the_next(driver, finished, server):
    server.start()
    setting = f"tracking.uri={server.uri}"
    process = driver.start(setting)
    driver.wait_for("train-1-harbour", process)
    server.kill()
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, "")
    (line,) = warnings(out)
    assert "no answer" in line
    assert "run it again later to record it" in line
    before = driver.finished()
    server.start()
    code, out, err = driver.finish(setting)
    assert (code, warnings(out)) == (0, []), err
    assert driver.finished() == before
    assert json.loads((driver.run / "metrics.json").read_text()) == finished.metrics("gradient")
    check_whole(server.uri, open_run(loading.load(driver.config)))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_server_that_is_not_there_gets_everything_from_the_next_run(driver, server):
    setting = f"tracking.uri={server.uri}"
    code, out, err = driver.finish(setting)
    assert (code, err) == (0, "")
    (line,) = warnings(out)
    assert "no answer" in line
    server.start()
    code, out, err = driver.finish(setting)
    assert (code, warnings(out)) == (0, []), err
    check_whole(server.uri, open_run(loading.load(driver.config)))
