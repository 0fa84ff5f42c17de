"""Runs submitted as Ray jobs to a cluster of several nodes, which then loses one."""

import json
import os
import secrets
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from ray.job_submission import JobStatus, JobSubmissionClient
from reference.nodes import RAY, Node, free_port, wait_until

from pipeline import artifact

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]

ROOT = Path(__file__).parents[2]
SMALL = "tasks.count=2 tasks.entities=3 model.pretraining.entities=8 model.pretraining.epochs=8"


class Cluster:
    """A head without CPUs and worker nodes of one CPU each, with token authentication."""

    def __init__(self, folder):
        self.storage, self.port, dashboard = folder / "storage", free_port(), free_port()
        self.token = folder / "token"
        self.token.write_text(secrets.token_hex(32))
        self.token.chmod(0o600)
        self.environment = {
            **{k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "PYTHONPATH")},
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token),
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
            "AGCL_STORAGE": str(self.storage),
        }
        self.folder, self.workers, self.joined = folder, [], 0
        self.head = Node(
            self.environment,
            "--head",
            "--num-cpus=0",
            "--node-ip-address=127.0.0.1",
            f"--port={self.port}",
            "--dashboard-host=127.0.0.1",
            f"--dashboard-port={dashboard}",
            f"--temp-dir={folder / 'head'}",
        )
        wait_until(lambda: self.ray_job("list").returncode == 0, 90, "no dashboard")

    def ray_job(self, *arguments):
        return subprocess.run(
            [RAY, "job", *arguments],
            env=self.environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )

    def have(self, number):
        """Fresh worker nodes in place of those there were."""
        self.end_workers()
        for _ in range(number):
            self.join()

    def join(self, **environment):
        """Another worker node, once it is up: two that start at once may want the same port."""
        # A folder of its own, as on a machine of its own: a node that fetches the working directory
        # begins by clearing it away.
        self.joined += 1
        folder = f"--temp-dir={self.folder / str(self.joined)}"
        address = f"--address=127.0.0.1:{self.port}"
        node = Node({**self.environment, **environment}, address, "--num-cpus=1", folder)
        self.workers.append(node)
        wait_until(lambda: node.processes("DashboardAgent"), 180, "no worker node")

    def end_workers(self):
        while self.workers:
            self.workers.pop().end()

    def submit(self, job, *settings, environment=None):
        """Submit the built-in config as the README says, made small; goes on at once."""
        extra = {"excludes": ["/tests/"], "env_vars": environment or {}}
        command = [
            *("submit", "--no-wait", "--submission-id", job, "--working-dir", "."),
            *("--runtime-env-json", json.dumps(extra)),
            *("--", sys.executable, "-m", "jobs", "run", "jobs/configs/facts.yaml"),
            *(*SMALL.split(), *settings),
        ]

        def accepted():
            done = self.ray_job(*command)
            # The head's agent comes up after its dashboard.
            assert done.returncode == 0 or "No available agent" in done.stderr, done.stderr
            return done.returncode == 0

        wait_until(accepted, 60, "no agent")

    def outcome(self, client, job):
        """How a job ended: its driver's exit code (None if it does not end), and its log."""
        ended = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED)
        with suppress(TimeoutError):
            wait_until(lambda: client.get_job_status(job) in ended, 300, "the job does not end")
        return client.get_job_info(job).driver_exit_code, client.get_job_logs(job)

    def training(self, client, job):
        """The node that trains, once the first task is under way."""
        stages = self.storage / "stages"
        try:
            wait_until(lambda: list(stages.glob("train-1-*.part")), 150, "no training")
        except TimeoutError:
            pytest.fail(client.get_job_logs(job))
        return wait_until(
            lambda: [node for node in self.workers if node.processes("RayTrainWorker")], 10, "none"
        )[0]

    def finished(self):
        """Manifests of the finished artifacts by folder."""
        folders = (self.storage / "stages").glob("*")
        manifests = {f.name: artifact.read_manifest(f) for f in folders if not f.suffix}
        return {name: manifest for name, manifest in manifests.items() if manifest is not None}


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
    return JobSubmissionClient(
        cluster.environment["RAY_API_SERVER_ADDRESS"],
        headers={"Authorization": f"Bearer {cluster.token.read_text()}"},
    )


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
    assert log.count("lost a worker in train/1-harbour; it is started again") == 1
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
