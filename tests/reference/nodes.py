"""Clusters of several nodes on this machine, started by `ray start`, and jobs on them."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from ray.job_submission import JobStatus, JobSubmissionClient
from reference.driver import processes_below

from pipeline.storage import artifact

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).parent / "ray"
SMALL = "tasks.count=2 tasks.entities=3 model.pretraining.entities=8 model.pretraining.epochs=8"


def wait_until(found, seconds, what):
    deadline = time.monotonic() + seconds
    while not (value := found()):
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.1)
    return value


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Node:
    """A node started by `ray start`."""

    def __init__(self, environment, *arguments, inside=()):
        """`inside` is a command that runs another in an isolated environment."""
        command = [*inside, RAY, "start", "--block", "--disable-usage-stats", *arguments]
        # Jobs are submitted to the head's agent; another cluster may hold its default port.
        own = ["--object-store-memory=100000000", f"--dashboard-agent-listen-port={free_port()}"]
        self.process = psutil.Popen(
            [*command, *own],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def processes(self, title=""):
        """The node's processes with a title like this."""
        return processes_below(self.process, title)

    def lose(self):
        """Die like a machine that is taken away: raylet and all processes, without shutdown."""
        (raylet,) = [process for process in self.processes() if process.name() == "raylet"]
        raylet.send_signal(signal.SIGKILL)

    def end(self):
        with suppress(psutil.NoSuchProcess):
            left = [*self.process.children(recursive=True), self.process]
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(left, timeout=30)


class Cluster:
    """A head without CPUs, and worker nodes with one CPU each; token authentication."""

    def __init__(self, folder, environment=None, *, own=None):
        """`own` is a folder that is private to each worker node, initially empty."""
        self.own = own
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
            **(environment or {}),
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
        wait_until(lambda: self.ray_job("list").returncode == 0, 180, "no dashboard")

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
        """Replace the worker nodes with new ones."""
        self.end_workers()
        for _ in range(number):
            self.join()

    def join(self, **environment):
        """Add a worker node and wait for it: two that start at once may pick the same port."""
        # A separate folder, as on a separate machine: a node that fetches the working directory
        # clears the folder first.
        self.joined += 1
        folder = f"--temp-dir={self.folder / str(self.joined)}"
        address = f"--address=127.0.0.1:{self.port}"
        hidden = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"']
        node = Node(
            {**self.environment, **environment},
            *(address, "--num-cpus=1", folder),
            inside=[] if self.own is None else [*hidden, self.own],
        )
        self.workers.append(node)
        wait_until(lambda: node.processes("DashboardAgent"), 180, "no worker node")

    def end_workers(self):
        while self.workers:
            self.workers.pop().end()

    def client(self):
        return JobSubmissionClient(
            self.environment["RAY_API_SERVER_ADDRESS"],
            headers={"Authorization": f"Bearer {self.token.read_text()}"},
        )

    def submit(self, job, *settings, environment=None):
        """Submit a small version of the built-in config as in the README; do not wait."""
        extra = {"excludes": ["/tests/"], "env_vars": environment or {}}
        command = [
            *("submit", "--no-wait", "--submission-id", job, "--working-dir", "."),
            *("--runtime-env-json", json.dumps(extra)),
            *("--", sys.executable, "-m", "jobs", "run", "jobs/configs/facts.yaml"),
            *(*SMALL.split(), *settings),
        ]

        def accepted():
            done = self.ray_job(*command)
            # The head's agent starts after its dashboard.
            assert done.returncode == 0 or "No available agent" in done.stderr, done.stderr
            return done.returncode == 0

        wait_until(accepted, 60, "no agent")

    def outcome(self, client, job):
        """Wait for a job; return its driver's exit code (None on timeout) and its log."""
        ended = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED)
        with suppress(TimeoutError):
            wait_until(lambda: client.get_job_status(job) in ended, 300, "the job does not end")
        return client.get_job_info(job).driver_exit_code, client.get_job_logs(job)

    def training(self, client, job):
        """The node that trains, once training on the first task has started."""
        stages = self.storage / "stages"
        try:
            wait_until(lambda: list(stages.glob("train-1-*.part")), 150, "no training")
        except TimeoutError:
            pytest.fail(client.get_job_logs(job))
        return self.trainers()[0]

    def trainers(self):
        """The nodes that train."""
        return wait_until(
            lambda: [node for node in self.workers if node.processes("RayTrainWorker")], 10, "none"
        )

    def finished(self):
        """Manifests of the finished artifacts, by folder."""
        folders = (self.storage / "stages").glob("*")
        manifests = {f.name: artifact.read_manifest(f) for f in folders if not f.suffix}
        return {name: manifest for name, manifest in manifests.items() if manifest is not None}
