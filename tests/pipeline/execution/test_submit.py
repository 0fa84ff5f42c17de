"""Runs submitted as Ray jobs to a cluster of several nodes, which then loses one."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from ray.job_submission import JobStatus
from reference.nodes import ROOT, Cluster, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    # Paths of sockets must be short.
    import tempfile

    with tempfile.TemporaryDirectory(prefix="ra", dir="/tmp", ignore_cleanup_errors=True) as folder:
        cluster = Cluster(Path(folder))
        yield cluster
        cluster.end_workers()
        cluster.head.end()


@pytest.fixture(scope="module")
def client(cluster):
    return cluster.client()


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_job_survives_the_loss_of_the_node_that_trains(cluster, client, num_workers):
    cluster.have(num_workers + 1)
    job = f"lost-{num_workers}"
    several = [f"resources.num_workers={num_workers}", "training.micro_batch_size=8"]
    cluster.submit(job, f"name={job}", f"seed={num_workers}", "training.epochs=300", *several)
    node = cluster.training(client, job)
    before = cluster.finished()
    node.lose()
    code, log = cluster.outcome(client, job)
    assert code == 0, log
    assert log.count("lost a worker in train/1-harbour; restarting it") == 1
    # What was finished before was neither made again nor touched.
    assert before.items() <= cluster.finished().items()
    assert log.count(" done pretrain") == 1
    assert log.count(" done train/1-harbour") == 1
    metrics = json.loads((cluster.storage / job / "metrics.json").read_text())
    assert len(metrics["accuracy_matrix"]) == 3
    assert not list(cluster.storage.rglob("*.part"))
    # Plain lines: nothing is drawn again.
    assert "\x1b[" not in log.partition("metrics")[0].replace("\x1b[33m(raylet)\x1b[0m", "")


def test_a_stopped_job_ends_its_workers_and_goes_on_when_submitted_again(cluster, client):
    cluster.have(1)
    cluster.submit("stopped", "name=stopped", "seed=7", "training.epochs=300")
    node = cluster.training(client, "stopped")
    assert cluster.ray_job("stop", "stopped").returncode == 0
    assert client.get_job_status("stopped") == JobStatus.STOPPED
    wait_until(lambda: not node.processes("RayTrainWorker"), 10, "workers go on")
    assert "interrupted; the same command goes on" in client.get_job_logs("stopped")
    before = cluster.finished()
    assert any(name.startswith("pretrain") for name in before)
    cluster.submit("again", "name=stopped", "seed=7", "training.epochs=300")
    code, log = cluster.outcome(client, "again")
    assert code == 0, log
    assert before.items() <= cluster.finished().items()
    assert " done pretrain" not in log
    assert not list(cluster.storage.rglob("*.part"))


@pytest.fixture
def hour_ahead(tmp_path):
    """The environment of a node whose clock is an hour ahead."""
    library, source = tmp_path / "hour_ahead.so", ROOT / "tests" / "reference" / "hour_ahead.c"
    if shutil.which("gcc") is None:
        pytest.skip("setting a process's clock needs gcc")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return {"LD_PRELOAD": str(library)}


def run_on_one_node(cluster, client, job, kills, **environment):
    """Metrics of a run in a storage folder of its own, whose worker is killed as it trains."""
    cluster.end_workers()
    cluster.join(**environment)
    storage = cluster.folder / job
    settings = (f"storage={storage}", "name=run", "resources.checkpoint_minutes=0.0001")
    cluster.submit(job, *settings, "training.epochs=100")
    wait_until(lambda: list(storage.glob("stages/train-1-*.checkpoint")), 300, "no training")
    for worker in cluster.workers[0].processes("RayTrainWorker")[:kills]:
        worker.kill()
    code, log = cluster.outcome(client, job)
    assert code == 0, log
    assert log.count("lost a worker in ") == kills
    return json.loads((storage / "run" / "metrics.json").read_text())


def test_a_node_whose_clock_is_an_hour_ahead_changes_nothing(cluster, client, hour_ahead):
    ahead = run_on_one_node(cluster, client, "ahead", 1, **hour_ahead)
    assert ahead == run_on_one_node(cluster, client, "in-time", 0)


def test_a_job_whose_workers_find_no_room_any_more_fails_with_one_line(cluster, client):
    cluster.have(2)
    cluster.submit(
        *("no-room", "name=no-room", "seed=8", "training.epochs=300"),
        *("resources.num_workers=2", "training.micro_batch_size=8"),
        environment={"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10"},
    )
    cluster.training(client, "no-room").lose()
    code, log = cluster.outcome(client, "no-room")
    assert code == 1, log
    (line,) = [line for line in log.splitlines() if line.startswith("agcl: ")]
    assert (
        "stage train/1-harbour failed: resources: the cluster has room for 1 of 2 workers" in line
    )


def test_a_job_that_no_cluster_like_this_can_run_ends_before_any_work(cluster, client):
    cluster.have(1)
    before = cluster.finished()
    cluster.submit("too-large", "name=too-large", "seed=9", "resources.cpus_per_worker=64")
    code, log = cluster.outcome(client, "too-large")
    assert code == 2, log
    assert "room for 0 of 1 workers that need 64 CPU each" in log
    assert cluster.finished() == before
