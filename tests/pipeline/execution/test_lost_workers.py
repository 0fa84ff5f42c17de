"""Sessions whose workers die, on a cluster of this machine; test_submit.py kills whole nodes."""

import io
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import psutil
import pytest
import ray
import torch
from rich.console import Console

from agcl.errors import InputError
from pipeline.config.resources import Resources
from pipeline.errors import StageFailed
from pipeline.execution import progress
from pipeline.execution.cluster import cluster
from pipeline.execution.failures import is_peer_loss, why_lost
from pipeline.execution.mailbox import Mailbox
from pipeline.execution.progress import StageProgress
from pipeline.execution.scheduler import _Group, _Sessions, run_sessions
from pipeline.execution.session import run_stages
from pipeline.execution.workers import (
    LOSSES,
    _check_scratch,
    _interrupts_as_before,
    _unfinished,
)
from pipeline.plan.schedule import Session
from pipeline.plan.stage import Stage, resolve
from pipeline.stages.context import Context
from pipeline.storage import Bucket, Local, artifact
from pipeline.storage.object_store import StoreFailed

pytestmark = pytest.mark.ray


def run_on_a_cluster(folder, train, sessions):
    """Run stages by session: how often each was called, the records, and the failures by stage.

    Beside each file of calls one names the worker group of the last of them.
    """

    # Nested, since Ray sends such functions to its workers by value.
    def run(config, inputs, out_dir, context):
        file = folder / config["name"]
        file.with_suffix(".group").write_text(ray.get_runtime_context().get_task_id())
        with file.open("a") as calls:
            calls.write("x")
        call = file.stat().st_size
        (out_dir / "out.txt").write_text("x")
        if call in config.get("killed", ()):
            os.kill(os.getpid(), signal.SIGKILL)
        if call in config.get("kills_group", ()):
            (group,) = [p for p in psutil.Process().parent().children() if "run_group" in p.name()]
            group.kill()
            time.sleep(600)  # Ray ends what the group started.
        if config.get("checkpoints"):
            artifact.checkpoint_of(context.folder).write_text("x" * call)
        if call in config.get("loses_others", ()):
            raise ray.exceptions.WorkerCrashedError
        if config.get("wrong"):
            raise ValueError("row 3 is empty")

    def session(name, configs):
        after = {config["after"] for config in configs if "after" in config}
        stages, last = [], {}
        for config in configs:
            stages.append(Stage(config["name"], run, config, last))
            last = {"before": stages[-1]}
        resolved = tuple(resolve(stages, Local(folder / "storage")).values())
        return Session(name, resolved, train, ("one",), frozenset(after))

    records = []
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        with cluster(Resources()):
            failures = run_sessions(
                [session(name, configs) for name, configs in sessions.items()],
                folder / "scratch",
                Resources(),
                2,
                records.extend,
                keep_going=True,
            )
    by_stage = {failure.stage: failure for failure in failures}
    return lambda name: (folder / name).stat().st_size, records, by_stage


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("toys")


@pytest.fixture(scope="module")
def ran(folder):
    """Sessions that lose processes they work with, or fail by themselves."""
    twice = [1, LOSSES - 1]
    sessions = {
        "wrong": [{"name": "c", "wrong": True}],
        "lost": [{"name": "d", "loses_others": [*range(1, LOSSES + 1)]}],
        "killed": [{"name": "j"}, {"name": "k", "killed": [1]}],
        "long": [{"name": "g", "loses_others": [*range(1, LOSSES + 2)], "checkpoints": True}],
        "first": [{"name": "h"}],
        "second": [{"name": "i", "after": "first"}],
        "slow": [{"name": "e", "loses_others": twice}, {"name": "f", "loses_others": twice}],
    }
    return run_on_a_cluster(folder, False, sessions)


def of(records, name):
    return [r["state"] for r in records if "state" in r and r["artifact"].startswith(f"{name}-")]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_killed_worker_is_started_again_at_the_unfinished_stage(tmp_path):
    killed = {"killed": [{"name": "a"}, {"name": "b", "killed": [1]}]}
    calls, records, failures = run_on_a_cluster(tmp_path, True, killed)
    assert calls("a") == 1
    assert calls("b") == 2
    assert of(records, "a") == ["started", "finished"]
    assert of(records, "b") == ["started", "lost", "started", "finished"]
    assert not failures


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_workers_whose_groups_own_process_is_killed_are_started_again(tmp_path):
    lost = {"lost": [{"name": "a"}, {"name": "b", "kills_group": [1]}]}
    calls, records, failures = run_on_a_cluster(tmp_path, True, lost)
    assert calls("a") == 1
    assert calls("b") == 2
    assert of(records, "b") == ["started", "lost", "started", "finished"]
    assert not failures


def test_a_stages_own_error_is_not_tried_again(ran):
    calls, _, failures = ran
    assert calls("c") == 1
    assert failures["c"].error == "row 3 is empty"


def test_a_session_that_is_lost_without_progress_fails_in_the_end(ran):
    calls, records, failures = ran
    assert calls("d") == LOSSES
    assert of(records, "d") == ["started", "lost"] * (LOSSES - 1) + ["started", "failed"]
    assert "its workers were lost" in str(failures["d"])


def test_a_group_whose_own_process_is_killed_is_replaced_at_the_unfinished_stage(ran):
    calls, records, _ = ran
    assert calls("j") == 1
    assert calls("k") == 2
    assert of(records, "j") == ["started", "finished"]
    assert of(records, "k") == ["started", "lost", "started", "finished"]


def test_losses_count_from_the_last_finished_stage_on(ran):
    calls, _, failures = ran
    assert calls("e") == calls("f") == LOSSES
    assert set(failures) == {"c", "d"}


def test_losses_count_from_the_last_checkpoint_on(ran):
    calls, records, _ = ran
    assert calls("g") == LOSSES + 2
    assert of(records, "g")[-1] == "finished"


def test_a_group_stays_for_the_next_session(ran, folder):
    groups = {file.stem: file.read_text() for file in folder.glob("*.group")}
    sessions = groups.keys() - {"f"}  # In the session of e.
    assert len({groups[name] for name in sessions}) < len(sessions)


def test_what_starts_workers_imports_nothing_that_only_stages_need():
    code = (
        "import sys, pipeline.execution.workers\n"
        "assert not {'torch', 'transformers', 'boto3', 'mlflow'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_node_that_does_not_see_the_storage_folder_is_named(tmp_path):
    records = []
    stage = Stage("train/1-x", run_stages, {})
    (found,) = resolve([stage], Local(tmp_path / "storage")).values()
    _check_scratch(tmp_path, found, records.extend)
    assert not records
    with pytest.raises(InputError, match=f"^storage: node .* does not see {tmp_path}/run of"):
        _check_scratch(tmp_path / "run" / "scratch", found, records.extend)
    assert [(r["artifact"], r["state"]) for r in records] == [(found.folder.name, "failed")]
    stored = replace(found, storage=Bucket("s3://bucket/runs"))
    _check_scratch(tmp_path / "run" / "scratch", stored, records.extend)


@pytest.fixture
def mailbox():
    """The mailbox itself, in this process."""
    return Mailbox.__ray_metadata__.modified_class()


def test_groups_take_sessions_in_order_and_every_rank_gets_the_same(mailbox):
    assert mailbox.next("one", True, 0) is None
    for name in "abc":
        mailbox.queue(True, name, [name])
    mailbox.queue(False, "rows", ["rows"])
    assert mailbox.next("one", True, 0) == mailbox.next("one", True, 0) == ["a"]
    assert mailbox.next("two", True, 0) == ["b"]
    assert mailbox.next("three", False, 0) == ["rows"]
    assert mailbox.running() == {"one": "a", "two": "b", "three": "rows"}
    mailbox.finish("one")
    assert mailbox.take() == ([], ["a"], {"two": "b", "three": "rows"})
    assert mailbox.next("one", True, 1) == ["c"]
    assert mailbox.take() == ([], [], {"one": "c", "two": "b", "three": "rows"})


class Remote:
    """An object in this process that is called as an actor is."""

    def __init__(self, of):
        self.of = of

    def __getattr__(self, name):
        return SimpleNamespace(remote=getattr(self.of, name))


@pytest.fixture
def as_if_remote(monkeypatch):
    """Ray without processes: what a call returns is its reference, and every reference is ready."""
    fake = SimpleNamespace(
        get=lambda ref: ref,
        put=lambda value: value,
        wait=lambda refs, timeout: (refs, []),
        cancel=lambda ref: None,
        exceptions=ray.exceptions,
    )
    monkeypatch.setattr("pipeline.execution.workers.ray", fake)
    monkeypatch.setattr("pipeline.execution.scheduler.ray", fake)


@pytest.mark.usefixtures("as_if_remote")
def test_a_session_that_is_lost_after_its_last_artifact_counts_as_finished(mailbox, tmp_path):
    """Else what comes after it would wait for ever."""

    def write(config, inputs, out_dir, context):
        (out_dir / "out.txt").write_text("x")

    def session(name):
        (stage,) = resolve([Stage(name, write, {"name": name})], Local(tmp_path)).values()
        return Session(name, (stage,), True, ("one",), frozenset())

    done, next_one = session("a"), session("b")
    run_stages(done.stages, Context(ray_data=False), lambda records: None)
    for each in (done, next_one):
        mailbox.queue(True, each.name, [each])
    assert mailbox.next("group", True, 0) == [done]
    assert _unfinished("group", True, Remote(mailbox)) == list(next_one.stages)
    assert mailbox.take() == ([], ["a"], {"group": "b"})


def test_ray_trains_handler_of_interrupts_is_taken_back():
    before = signal.getsignal(signal.SIGINT)
    with suppress(KeyError), _interrupts_as_before():
        signal.signal(signal.SIGINT, lambda number, frame: None)
        raise KeyError
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.usefixtures("as_if_remote")
def test_groups_that_are_lost_before_they_take_a_session_fail_it_in_the_end(
    mailbox, tmp_path, monkeypatch
):
    (stage,) = resolve([Stage("a", run_stages, {})], Local(tmp_path)).values()
    waiting = Session("a", (stage,), True, ("one",), frozenset())
    run = _Sessions({}, tmp_path, Resources(), 1, print, False, Remote(mailbox), {"a": waiting})
    lost = ray.exceptions.WorkerCrashedError()
    monkeypatch.setattr("pipeline.execution.scheduler._error_of", lambda ref: lost)
    for number in range(LOSSES):
        assert not run.failures
        run.groups = {number: _Group(f"group {number}", True)}
        run.unneeded = {"group 7"}
        run.poll()
    (failure,) = run.failures
    assert failure.stage == "a"
    assert not run.queued
    run.groups = {7: _Group("group 7", True)}
    run.poll()  # Cancelled by the scheduler itself.
    assert len(run.failures) == 1


@pytest.fixture
def losing(mailbox, tmp_path, monkeypatch):
    """A run with one session, and a function by which a group takes it and is lost."""
    (stage,) = resolve([Stage("prepare/x", run_stages, {})], Local(tmp_path)).values()
    session, records = Session("prepare", (stage,), False, ("one",), frozenset()), []
    queued = {"prepare": session}
    run = _Sessions({}, tmp_path, Resources(), 1, records.extend, False, Remote(mailbox), queued)
    mailbox.queue(False, "prepare", [session])
    numbers = count()

    def lose(error=None):
        group = f"group {next(numbers)}"
        assert mailbox.next(group, False, 0) == [session]
        error = error or ray.exceptions.WorkerCrashedError()
        monkeypatch.setattr("pipeline.execution.scheduler._error_of", lambda ref: error)
        run.groups = {group: _Group(group, False)}
        run.poll()
        return group

    return SimpleNamespace(run=run, stage=stage, records=records, lose=lose)


@pytest.mark.usefixtures("as_if_remote")
def test_a_session_whose_groups_process_is_lost_goes_to_another_group(losing, mailbox):
    for _ in range(LOSSES - 1):
        group = losing.lose()
        assert not losing.run.failures
        assert list(losing.run.queued) == ["prepare"]
        assert not mailbox.running()
        assert mailbox.next(group, False, 0) == []  # A worker of it that Ray has not ended yet.
    losing.lose()
    (failure,) = losing.run.failures
    assert failure.stage == "prepare/x"
    assert "its workers were lost" in failure.error
    assert [r["state"] for r in losing.records] == ["lost"] * (LOSSES - 1) + ["failed"]


def remote(of):
    """What is called, with options, as a task or an actor is."""
    return SimpleNamespace(options=lambda **options: SimpleNamespace(remote=of))


@pytest.mark.usefixtures("as_if_remote")
def test_a_run_goes_on_after_the_loss_of_its_only_group(mailbox, tmp_path, monkeypatch):
    def write(config, inputs, out_dir, context):
        (out_dir / "out.txt").write_text("x")

    def start(group, *arguments):
        """The error with which the group ends, once it is waited for."""
        ((session,), records) = mailbox.next(group, False, 0), []
        if group == "group 1":
            return ray.exceptions.WorkerCrashedError()
        run_stages(session.stages, Context(ray_data=False), records.extend)
        mailbox.put(records)
        mailbox.finish(group)
        return "no error"

    def error_of(ref):
        return ref if isinstance(ref, Exception) else None

    of_scheduler = "pipeline.execution.scheduler."
    monkeypatch.setattr(of_scheduler + "Mailbox", remote(lambda: Remote(mailbox)))
    monkeypatch.setattr(of_scheduler + "run_group", remote(start))
    monkeypatch.setattr(of_scheduler + "here", lambda: None)
    monkeypatch.setattr(of_scheduler + "_error_of", error_of)
    (stage,) = resolve([Stage("prepare/x", write, {})], Local(tmp_path)).values()
    session, records = Session("prepare", (stage,), False, ("one",), frozenset()), []
    assert not run_sessions([session], tmp_path / "scratch", Resources(), 1, records.extend)
    assert [record["state"] for record in records] == ["lost", "started", "finished"]


@pytest.mark.usefixtures("as_if_remote")
def test_losses_of_a_groups_process_count_from_the_last_checkpoint_on(losing):
    losing.stage.folder.parent.mkdir(exist_ok=True)
    for number in range(LOSSES + 1):
        losing.lose()
        assert not losing.run.failures
        checkpoint = artifact.checkpoint_of(losing.stage.folder)
        checkpoint.touch()
        os.utime(checkpoint, (number, number))


@pytest.mark.parametrize("why", ["raised", "failed", "ending"])
@pytest.mark.usefixtures("as_if_remote")
def test_a_session_is_not_queued_again(losing, mailbox, why):
    """If its group itself gave up, if a stage has failed, or if no session starts any more."""
    if why == "failed":
        record = {"artifact": losing.stage.folder.name, "state": "failed"}
        mailbox.put([{**record, "error": "row 3 is empty", "traceback": "row 3"}])
    if why == "ending":
        losing.run.failures = [StageFailed("other", "row 5 is empty", "row 5")]
    raised = ray.exceptions.RayTaskError("run_group", "Traceback", ValueError())
    losing.lose(raised if why == "raised" else None)
    assert losing.run.failures[-1].stage == "prepare/x"
    assert not mailbox.queues[False]


def test_a_closed_queue_is_emptied_and_then_ends_its_groups(mailbox):
    mailbox.queue(True, "a", ["a"])
    mailbox.close(True)
    assert mailbox.next("one", True, 0) == ["a"]
    assert mailbox.next("two", True, 0) == mailbox.next("two", True, 0) == []
    assert mailbox.next("three", False, 0) is None


def test_a_stopped_mailbox_gives_out_nothing_new(mailbox):
    mailbox.queue(True, "a", ["a"])
    mailbox.queue(True, "b", ["b"])
    mailbox.next("one", True, 0)
    mailbox.stop()
    assert mailbox.next("one", True, 0) == ["a"]
    assert mailbox.next("two", True, 0) == []


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (ray.exceptions.RayActorError(), True),
        (ray.exceptions.TaskCancelledError(), False),
        (torch.distributed.DistBackendError("NCCL error: remote process exited"), True),
        (RuntimeError("[gloo/transport/tcp/pair.cc:537] Connection reset by peer"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (torch.OutOfMemoryError("gloo"), False),
        (ValueError("row 3 is empty"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_a_lost_worker_is_told_from_a_stages_own_error(error, lost):
    assert is_peer_loss(error) is lost


def test_in_a_log_progress_is_plain_lines():
    out = io.StringIO()
    with StageProgress(Console(file=out, width=80), {"a-1": "train/1-x", "b-1": "report"}) as shown:
        shown.observe([{"artifact": "a-1", "state": s} for s in ("started", "lost", "started")])
        shown.observe([{"artifact": "a-1", "note": "resumes after step 2 of 3"}])
        shown.observe([{"artifact": "a-1", "state": "finished"}])
        shown.observe([{"artifact": "b-1", "state": "started"}])
        shown.observe([{"artifact": "b-1", "state": "failed"}])
    lost, resumed, done, failed = out.getvalue().splitlines()
    assert lost.split() == "lost a worker in train/1-x; restarting it".split()
    assert resumed.strip() == "train/1-x resumes after step 2 of 3"
    assert done.split()[:2] == ["done", "train/1-x"]
    assert failed.split()[:2] == ["failed", "report"]
    assert "\x1b" not in out.getvalue()


def test_a_long_stage_shows_loss_speed_memory_and_time_left(monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    out = io.StringIO()
    speed = {"tokens_per_second": 1234.4, "mfu": 0.421, "peak_memory_gb": 3.14}
    with StageProgress(Console(file=out, width=120), {"a-1": "train/1-x"}) as shown:
        shown.observe([{"artifact": "a-1", "state": "started"}])
        record = {"artifact": "a-1", "step": 3, "of_steps": 9, "loss": 0.5, "seconds_left": 61.4}
        shown.observe([record | speed])
        shown.observe([{"artifact": "a-1", "step": 8, "texts": 8, "of_texts": 96}])
        shown.observe([{"artifact": "a-1", "step": 48, "rows": 48}])
        shown.observe([{"artifact": "a-1", "step": 2, "test/valley": 0.5}])
    *_, loss, texts, rows, tasks = out.getvalue().splitlines()
    assert loss.endswith(
        "train/1-x 3/9 steps, loss 0.5000, 1,234 tokens/s, 42% of peak, 3.1 GB, 1:01 left"
    )
    assert texts.endswith(" 8/96 texts")
    assert rows.endswith(" 48 rows")
    assert tasks.endswith(" task 2")


def test_a_store_that_does_not_answer_is_no_lost_worker():
    error = StoreFailed("s3://bucket/stages: no answer")
    raised = ray.exceptions.RayTaskError("run_group", "Traceback", error).as_instanceof_cause()
    assert why_lost(raised) == str(error)
