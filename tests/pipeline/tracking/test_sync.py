"""MLflow that is down, broken or killed: the run goes on, and its record is whole afterwards."""

import json
import os
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import time
import urllib.request
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from types import SimpleNamespace

import mlflow
import pytest
from reference.record import check_whole
from reference.stored import move_to
from tensorboardX.proto.event_pb2 import Event

from agcl.errors import InputError
from pipeline.config import loading
from pipeline.plan.stage import ResolvedStage
from pipeline.results.run_folder import open_folder
from pipeline.run import open_run
from pipeline.storage import Bucket
from pipeline.tracking import sync
from pipeline.tracking.client import Client, TrackingFailed
from pipeline.tracking.metric_files import MetricFiles, _metrics
from pipeline.tracking.mirrored_run import MirroredRun
from pipeline.tracking.tracker import Tracker

BASE = ("tokenizer", "prepare", "pretrain", "evaluate/0")
BACK = "MLflow is back; recorded what it missed"
RERUN = "rerun the same command to record it"
CONTINUING = f"continuing without MLflow; {RERUN}"
TRAIN = "train/1-harbour"


@pytest.fixture
def shown(replay):
    """Shows runs of MLflow by name; of a name there is one."""

    def find():
        client = mlflow.MlflowClient(replay.uri)
        runs = client.search_runs([client.get_experiment_by_name("agcl").experiment_id])
        assert len({run.info.run_name for run in runs}) == len(runs)
        return {run.info.run_name: run for run in runs}

    return find


@pytest.fixture
def steps(replay, shown):
    """The steps of a stage's metric that MLflow shows."""

    def find(stage, key="loss"):
        client = mlflow.MlflowClient(replay.uri)
        points = client.get_metric_history(shown()[stage].info.run_id, key)
        return sorted(point.step for point in points)

    return find


def test_what_the_base_model_still_knows_is_logged_by_task_index(replay, monkeypatch):
    read = ResolvedStage.read

    def read_with_base(stage, name):
        if name != "base.json":
            return read(stage, name)
        loss = 3.0 + int(stage.name.partition("/")[2][0])
        probes = {"piqa": {"acc": 0.0, "acc_norm": loss / 10}}
        later = {"kl": loss / 5} if loss > 3 else {"kl": 0.0}
        return json.dumps({"text_loss": loss, "probes": probes, **later}).encode()

    monkeypatch.setattr(ResolvedStage, "read", read_with_base)
    with replay.mirror() as mirror:
        replay.complete("tokenizer", "prepare", "pretrain", "evaluate")
        mirror.add("tiny", replay.run)
        client, parent = mlflow.MlflowClient(replay.uri), mirror.run_of("tiny")

        def points(key):
            found = client.get_metric_history(parent, key)
            return sorted((point.step, point.value) for point in found)

        assert points("base/text_loss") == [(0, 3.0), (1, 4.0), (2, 5.0)]
        assert points("base/kl") == [(0, 0.0), (1, 0.8), (2, 1.0)]
        assert points("base/probes/piqa") == [(0, 0.3), (1, 0.4), (2, 0.5)]
        facts = [
            next(iter(json.loads(read(found, "scores.json"))["base"].values()))
            for stage, found in replay.run.resolved.items()
            if stage.startswith("evaluate/")
        ]
        assert points("base/facts") == list(enumerate(facts))
        assert len(facts) == 3
        logged = client.get_run(parent).data.metrics
        assert not any(key.endswith("/base") for key in logged)


@contextmanager
def broken(replay):
    """MLflow's database lacks a table."""
    with closing(sqlite3.connect(replay.run.config.storage.root / "mlflow.db")) as database:
        database.execute("ALTER TABLE metrics RENAME TO gone")
        yield
        database.execute("ALTER TABLE gone RENAME TO metrics")


def no_server(storage, uri, experiment):
    raise TrackingFailed("cannot use MLflow at there (no answer)", no_answer=True)


def test_a_server_that_is_down_at_the_start_gets_what_it_missed(replay, monkeypatch):
    monkeypatch.setattr(sync, "Tracker", no_server)
    with replay.mirror() as mirror:
        replay.complete(*BASE)
        mirror.add("tiny", replay.run)
        replay.play(mirror, "train/1", "attribute/1", "evaluate/1")
        monkeypatch.setattr(sync, "Tracker", Tracker)
        replay.play(mirror, "train/2")
        assert mirror.run_of("tiny") is None  # No minute has passed.
        monkeypatch.setattr(sync, "_SECONDS_BETWEEN_SYNCS", 0.0)
        replay.play(mirror, "attribute/2")
        assert mirror.run_of("tiny")
        replay.play(mirror, "evaluate/2", "report")
        replay.finish(mirror)
    check_whole(replay.uri, replay.run)
    assert replay.said() == [
        f"warning cannot use MLflow at there (no answer); {CONTINUING}",
        BACK,
    ]


def test_a_database_that_fails_within_a_stage_misses_nothing(replay, steps, monkeypatch):
    monkeypatch.setattr(sync, "_SECONDS_BETWEEN_BATCHES", 0.0)
    replay.complete(*BASE)
    start, *metrics = replay.state(TRAIN, "started"), *replay.metrics(TRAIN)
    with replay.mirror() as mirror:
        mirror.add("tiny", replay.run)
        mirror.observe([start, *metrics[:2]])
        assert steps(TRAIN) == [1, 2]  # While it runs.
        with broken(replay):
            mirror.observe(metrics[2:4])
            (said,) = replay.said()
            assert "no such table: metrics" in said
            assert said.endswith(RERUN)
            assert mirror.run_of("tiny") is None
            mirror.observe(metrics[4:5])
        mirror.sync(now=True)
        mirror.observe(metrics[5:])
        assert steps(TRAIN) == list(range(6, len(metrics) + 1))  # Live again.
        replay.complete(TRAIN)
        mirror.observe([replay.state(TRAIN, "finished")])
        assert steps(TRAIN) == list(range(1, len(metrics) + 1))
        replay.play(mirror, "attribute", "evaluate/1", "train/2", "evaluate/2", "report")
        replay.finish(mirror)
    assert replay.said()[1:] == [BACK]
    check_whole(replay.uri, replay.run)


def test_what_a_killed_driver_left_is_recorded_once_with_its_own_times(replay, shown, steps):
    replay.complete(*BASE)
    killed = replay.mirror().__enter__()
    killed.add("tiny", replay.run)
    killed.observe([replay.state(TRAIN, "started"), *replay.metrics(TRAIN)])
    replay.complete(TRAIN)  # And nobody has said so.
    replay.play(killed, "evaluate/1")  # Its scores are there, and its child is not finished yet.
    evaluated = shown()["evaluate/1-harbour"].info.run_id
    mlflow.MlflowClient(replay.uri).update_run(evaluated, status="RUNNING")
    with replay.mirror() as mirror:
        mirror.add("tiny", replay.run)
        replay.play(mirror, "attribute", "train/2", "evaluate/2", "report")
        replay.finish(mirror)
    with replay.mirror() as mirror:
        mirror.add("tiny", replay.run)
        replay.finish(mirror)
    check_whole(replay.uri, replay.run)
    assert replay.said() == []
    for index, stage in enumerate(["evaluate/1-harbour", "evaluate/2-valley"], start=1):
        assert steps(stage, "memorization/valley") == [index]  # As on the run.
    runs, manifest = shown(), replay.run.resolved[TRAIN].manifest()
    assert runs[TRAIN].info.start_time == int(manifest["started"] * 1000)
    assert runs[TRAIN].info.end_time == int((manifest["started"] + manifest["seconds"]) * 1000)
    reused = {name for name, run in runs.items() if "reused" in run.data.tags}
    assert TRAIN in reused
    assert "attribute/1-harbour" not in reused


@pytest.mark.parametrize(
    ("error", "status"),
    [(ValueError("denied at http://me:hunter2@there"), "FAILED"), (KeyboardInterrupt(), "KILLED")],
)
def test_an_exception_closes_what_is_open(replay, shown, error, status):
    with suppress(ValueError, KeyboardInterrupt), replay.mirror() as mirror:
        mirror.add("tiny", replay.run)
        mirror.observe([replay.state(TRAIN, "started")])
        raise error
    runs = shown()
    assert {runs[name].info.status for name in ("tiny", TRAIN)} == {status}
    said = runs["tiny"].data.tags.get("error", "")
    assert said == str(error).replace("me:hunter2", "***")


def test_a_stage_that_failed_or_was_lost_says_why_until_it_starts_again(replay, shown):
    with replay.mirror() as mirror:
        mirror.add("tiny", replay.run)
        for state in ("lost", "failed"):
            mirror.observe([replay.state(TRAIN, "started"), replay.metrics(TRAIN)[0]])
            mirror.observe([replay.state(TRAIN, state, error=f"was {state}")])
            assert shown()[TRAIN].info.status == "FAILED"
            assert shown()[TRAIN].data.tags["error"] == f"was {state}"
        replay.play(mirror, TRAIN)
        assert shown()[TRAIN].info.status == "FINISHED"
    assert shown()["tiny"].info.status == "FAILED"  # A run that ended without its results.


def test_a_run_that_ends_while_mlflow_is_down_is_closed_when_it_is_back(replay, shown):
    with replay.mirror() as mirror:
        mirror.add("tiny", replay.run, kind="trial", without=BASE)
        with broken(replay):
            replay.play(mirror, TRAIN)
            mirror.end("tiny", {"average": 0.5}, status="KILLED", error="stopped early")
        mirror.sync(now=True)
        ended = shown()["tiny"]
    assert (ended.info.status, ended.data.tags["error"]) == ("KILLED", "stopped early")
    assert ended.data.metrics["average"] == 0.5
    assert set(shown()) == {"tiny", TRAIN}


def test_a_run_that_is_refused_keeps_no_other_from_its_end(replay, shown, monkeypatch):
    end = MirroredRun.end
    refused = {"one": "cannot register sums (no)", "two": "cannot register sums (never)"}

    def end_unless_refused(run, *arguments):
        if run.name in refused:
            raise TrackingFailed(refused[run.name], no_answer=False)
        end(run, *arguments)

    def mirrored():
        folder = replay.storage / "comparison"
        return sync.Mirror(replay.run.config, folder, "both", replay.console, kind="comparison")

    def finish(mirror):
        for label in ("one", "two", "three"):
            folder = replay.run.folder.with_name(label)
            open_folder(replace(replay.run, folder=folder))
            mirror.add(label, replace(replay.run, folder=folder))
        for label in ("one", "two", "three"):
            mirror.end(label, {"average": 0.5})
        mirror.sync(now=True)
        mirror.finish({})
        return {name: shown()[name].info.status for name in ("one", "two", "three", "both")}

    monkeypatch.setattr(MirroredRun, "end", end_unless_refused)
    with mirrored() as mirror:
        running = {"one": "RUNNING", "two": "RUNNING"}
        assert finish(mirror) == {**running, "three": "FINISHED", "both": "FINISHED"}
    assert replay.said() == [f"warning {why}; {RERUN}" for why in refused.values()]
    del refused["two"]
    with mirrored() as mirror:
        assert finish(mirror)["two"] == "FINISHED"
        refused.clear()
        mirror.sync(now=True)
        assert shown()["one"].info.status == "FINISHED"
    assert replay.said()[2:] == [f"warning cannot register sums (no); {RERUN}", BACK]


@pytest.mark.parametrize(("error", "status"), [("", "FINISHED"), ("all failed", "FAILED")])
def test_the_run_above_others_ends_as_failed_where_nothing_was_found(replay, shown, error, status):
    folder = replay.storage / "search"
    with sync.Mirror(replay.run.config, folder, "search", replay.console, kind="search") as mirror:
        mirror.finish({}, error=error)
    assert shown()["search"].info.status == status
    assert shown()["search"].data.tags.get("error", "") == error


def test_the_same_command_again_leaves_the_end_time_and_new_work_moves_it(replay, shown):
    def end():
        with replay.mirror() as mirror:
            mirror.add("tiny", replay.run)
            replay.finish(mirror)
        return shown()["tiny"].info.end_time

    replay.complete("")
    first = end()
    assert shown()["tiny"].data.tags["mlflow.note.content"] == "what came of it"
    time.sleep(0.01)
    assert end() == first
    mlflow.MlflowClient(replay.uri).delete_run(shown()["report"].info.run_id)
    assert end() > first


def test_other_settings_in_the_folder_of_a_killed_run_are_another_run(replay, shown):
    """MLflow's params and tags would stay those of the first."""
    runs = []
    for settings in ((), ("resources.cpus_per_worker=2",), ("training.learning_rate=1e-5",)):
        replay.use(None, *settings)
        with replay.mirror() as mirror:
            mirror.add("tiny", replay.run)
        runs.append(json.loads((replay.run.folder / "mlflow.json").read_text())["run_id"])
    assert runs[0] == runs[1] != runs[2]
    client = mlflow.MlflowClient(replay.uri)
    assert client.get_run(runs[2]).data.params["training.learning_rate"] == "1e-05"


def test_other_data_in_the_folder_of_a_run_are_another_run(replay, shown):
    """The config is the same; what its files hold is not."""
    runs = []
    for edited in (False, False, True):
        if edited:
            last = replay.run.resolved["report"]
            record = {**last.record, "fingerprint": "f00d"}
            replay.run.resolved["report"] = replace(last, record=record)
        with replay.mirror() as mirror:
            mirror.add("tiny", replay.run)
        runs.append(json.loads((replay.run.folder / "mlflow.json").read_text())["run_id"])
    assert runs[0] == runs[1] != runs[2]


def test_the_experiment_is_a_setting(replay):
    replay.use(None, "tracking.experiment=/Users/me/sequence")
    with replay.mirror() as mirror:
        mirror.add("tiny", replay.run)
    client = mlflow.MlflowClient(replay.uri)
    experiment = client.get_experiment_by_name("/Users/me/sequence").experiment_id
    assert [run.info.run_name for run in client.search_runs([experiment])] == ["tiny"]


def test_a_database_that_another_process_has_locked_is_tried_again_later():
    def call():
        raise RuntimeError("(sqlite3.OperationalError) database is locked")

    client = object.__new__(Client)
    client._uri = "sqlite:///there"
    with pytest.raises(TrackingFailed) as error:
        client._guarded(call)()
    assert error.value.no_answer


def test_no_stage_is_running_after_its_run_ended(replay, shown):
    with replay.mirror() as mirror:
        mirror.add("tiny", replay.run)
        mirror.observe([replay.state(TRAIN, "started")])
        replay.complete(TRAIN)  # And its worker was lost before it could say so.
        mirror.end("tiny", {})
        assert shown()[TRAIN].info.status == "FINISHED"


def test_a_stage_that_another_command_finishes_is_recorded_within_a_minute(
    replay, shown, monkeypatch
):
    with replay.mirror() as mirror:
        mirror.add("tiny", replay.run)
        replay.complete(TRAIN)
        mirror.observe([])
        assert TRAIN not in shown()
        monkeypatch.setattr(sync, "_SECONDS_BETWEEN_SYNCS", 0.0)
        mirror.observe([])
        assert shown()[TRAIN].info.status == "FINISHED"


def test_storage_that_cannot_be_read_does_not_end_the_run(replay, monkeypatch):
    def unreadable(stage):
        raise OSError("storage: s3://someone:hunter2@there: reset")

    with replay.mirror() as mirror:
        mirror.add("tiny", replay.run)
        monkeypatch.setattr(ResolvedStage, "is_complete", unreadable)
        mirror.sync(now=True)
    assert replay.said() == [f"warning storage: s3://***@there: reset; {CONTINUING}"]


@pytest.mark.slow
def test_a_silent_server_is_one_warning_within_seconds(replay):
    with socket.socket() as free:  # Bound and not listening: connections are refused.
        free.bind(("127.0.0.1", 0))
        replay.use(f"http://someone:secret@127.0.0.1:{free.getsockname()[1]}")
        started = time.monotonic()
        replay.mirror()
    assert time.monotonic() - started < 30
    (line,) = replay.said()
    assert line.endswith(f"(no answer); {CONTINUING}")
    assert "secret" not in line


def test_a_server_that_takes_connections_and_is_silent_is_tried_seldom(replay, monkeypatch):
    """Each attempt holds up the run."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(sync, "_SECONDS_BETWEEN_SYNCS", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        replay.use(f"http://127.0.0.1:{silent.getsockname()[1]}")
        mirror = replay.mirror()
        mirror.sync(now=True)
        started = time.monotonic()
        for _ in range(5):
            mirror.sync()
        assert time.monotonic() - started < 1
    assert len(replay.said()) == 1


@pytest.mark.parametrize("uri", ["magic://here", "nowhere:5000"])
def test_a_bad_uri_ends_before_any_work(tiny_config, tmp_path, uri):
    config = tiny_config(tmp_path / "storage", f"tracking.uri={uri}")
    with pytest.raises(InputError, match=r"^tracking\.uri: "):
        sync.Mirror(config, tmp_path / "storage" / "tiny", "tiny", None)
    assert not config.storage.root.exists()


def test_without_tracking_nothing_is_recorded(replay):
    replay.use(None, "tracking.enabled=false")
    with replay.mirror() as mirror:
        mirror.add("tiny", replay.run)
        replay.play(mirror, "")
        replay.finish(mirror)
        assert mirror.run_of("tiny") is None
    assert not (replay.run.folder / "mlflow.json").exists()


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


@pytest.mark.slow
def test_a_real_server_may_be_down_at_the_start_and_die_later(replay, server):
    replay.use(server.uri)
    with replay.mirror() as mirror:
        replay.complete(*BASE)
        mirror.add("tiny", replay.run)
        replay.play(mirror, "train/1")
        server.start()
        mirror.sync(now=True)
        replay.play(mirror, "attribute/1")
        server.kill()
        replay.play(mirror, "evaluate/1", "train/2", "attribute/2")
        server.start()
        replay.play(mirror, "evaluate/2", "report")
        replay.finish(mirror)
    check_whole(server.uri, replay.run)
    assert replay.said()[1::2] == [BACK, BACK]
    assert all("no answer" in line for line in replay.said()[::2])


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_server_that_dies_under_a_run_gets_everything_from_the_next(driver, finished, server):
    def warnings(out):
        return [line.strip() for line in out.splitlines() if "warning" in line]

    server.start()
    setting = f"tracking.uri={server.uri}"
    process = driver.start(setting)
    driver.wait_for("train-1-harbour", process)
    server.kill()
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, "")
    (line,) = warnings(out)
    assert line.endswith(f"(no answer); {CONTINUING}")
    before = driver.finished()
    server.start()
    code, out, err = driver.finish(setting)
    assert (code, warnings(out)) == (0, []), err
    assert driver.finished() == before
    assert json.loads((driver.run / "metrics.json").read_text()) == finished.metrics("gradient")
    check_whole(server.uri, open_run(loading.load(driver.config)))


def scalars(folder):
    """All points of TensorBoard's event files by run and tag, read as TensorBoard does."""
    found = {}
    for file in sorted(folder.rglob("events.*")):
        for record in summary_records(file):
            for value in record.summary.value:
                run = file.parent.relative_to(folder).as_posix()
                found.setdefault((run, value.tag), []).append((record.step, value.simple_value))
    return found


def summary_records(file):
    """The events of a file: length, checksum, message, checksum."""
    content = file.read_bytes()
    while content:
        (size,) = struct.unpack("<Q", content[:8])
        yield Event.FromString(content[12 : 12 + size])
        content = content[size + 16 :]


def test_metrics_are_plain_files_too_and_complete_whatever_was_seen(replay):
    """A run that dies in training, and is finished unseen by MLflow, which is off."""
    formats = "tracking.report_to=[jsonl,tensorboard]"
    replay.use(None, "tracking.enabled=false", formats)
    folder = replay.run.folder
    train = next(stage for stage in replay.run.resolved if stage.startswith("train/1"))
    with replay.mirror() as mirror:
        mirror.add("tiny", replay.run)
        replay.play(mirror, "prepare", "pretrain", "evaluate/0")
        mirror.observe([replay.state(train, "started")])
        mirror.observe(replay.metrics(train)[:3])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["stage"] == train] == [1, 2, 3]

    with replay.mirror() as mirror:
        mirror.add("tiny", replay.run)
        replay.play(mirror, train)
        replay.complete("evaluate", "attribute", "train", "report")
        replay.finish(mirror)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    expected = [record["loss"] for record in replay.metrics(train)]
    assert [line["loss"] for line in lines if line["stage"] == train] == expected
    report = json.loads((replay.run.resolved["report"].folder / "metrics.json").read_text())
    name, matrix = f"memorization/{report['tasks'][0]}", report["accuracy_matrix"]
    of_first = [row[0] for row in matrix]
    assert [line[name] for line in lines if name in line] == of_first
    found = scalars(folder / "tensorboard")
    assert found[".", name] == [(i, pytest.approx(score)) for i, score in enumerate(of_first)]
    losses = [(i, pytest.approx(loss)) for i, loss in enumerate(expected, start=1)]
    assert found[train, "loss"] == losses


def test_event_files_of_an_earlier_command_are_removed_in_a_bucket_too(tmp_path, monkeypatch):
    """They have other names, so a new upload does not replace them."""
    move_to(tmp_path / "cache", monkeypatch)
    storage = Bucket((tmp_path / "share").as_uri())
    run = SimpleNamespace(config=SimpleNamespace(storage=storage), folder=storage.root, resolved={})
    run.folder /= "run"
    old = tmp_path / "share" / "run" / "tensorboard" / "events.out.tfevents.1"
    old.parent.mkdir(parents=True)
    old.write_text("old")
    with storage.results(run.folder):
        files = MetricFiles(run, ["tensorboard"])
        files._writer("train/1").add_scalar("loss", 1.0, 1)
        files.close()
    assert [file != old for file in (tmp_path / "share").rglob("events.*")] == [True]


def test_the_time_left_is_no_metric():
    record = {"step": 2, "loss": 0.5, "of_steps": 9, "seconds": 1.0, "seconds_left": 61.4}
    assert _metrics(record) == {"loss": 0.5}
