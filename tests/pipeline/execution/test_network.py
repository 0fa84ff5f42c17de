"""Two nodes in network namespaces of their own, as on two machines, and the cable between them."""

import json
import os
import secrets
import signal
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
from reference.driver import processes_below
from reference.nodes import Node, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(2400)]

ADDRESSES = "10.77.0.1", "10.77.0.2"
HEAD = f"{ADDRESSES[0]}:6379"


def ip(*arguments):
    done = subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
    return done.stdout.split()


class Network:
    """Two nodes of one CPU each, joined by a cable."""

    def __init__(self, folder):
        self.names = [f"agcl{end}-{os.getpid()}" for end in "ab"]
        self.folder, self.nodes = folder, []
        token = folder / "token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        self.environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}

    def connect(self):
        for name in self.names:
            ip("netns", "add", name)
        one, other = self.names
        ip("link", "add", "cable", "netns", one, "type", "veth", "peer", "cable", "netns", other)
        for name, address in zip(self.names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", name, "link", "set", device, "up")

    def cut(self):
        ip("-n", self.names[1], "link", "set", "cable", "down")

    def mend(self):
        ip("-n", self.names[1], "link", "set", "cable", "up")

    def inside(self, end):
        """Begins a command that runs at one end."""
        return ["ip", "netns", "exec", self.names[end]]

    def start(self, end):
        """The node at one end, once it is up."""
        arguments = ["--head", "--port=6379"] if end == 0 else [f"--address={HEAD}"]
        node = Node(
            {**os.environ, **self.environment},
            *arguments,
            "--num-cpus=1",
            f"--node-ip-address={ADDRESSES[end]}",
            f"--temp-dir={self.folder / str(len(self.nodes))}",
            inside=self.inside(end),
        )
        self.nodes.append(node)
        wait_until(lambda: node.processes("DashboardAgent"), 240, "no node")
        return node

    def end(self):
        for node in self.nodes:
            node.end()
        for name in self.names:
            with suppress(OSError, subprocess.CalledProcessError):
                # A node that ended by itself leaves its agents.
                for number in ip("netns", "pids", name):
                    with suppress(ProcessLookupError):
                        os.kill(int(number), signal.SIGKILL)
                ip("netns", "delete", name)


@pytest.fixture
def network():
    # Paths of sockets must be short.
    with tempfile.TemporaryDirectory(prefix="rn", dir="/tmp", ignore_cleanup_errors=True) as folder:
        network = Network(Path(folder))
        try:
            network.connect()
        except (OSError, subprocess.CalledProcessError) as error:
            network.end()
            pytest.skip(f"no network namespaces: {error}")
        yield network
        network.end()


def test_a_node_that_is_cut_off_is_missed_and_the_run_goes_on_when_one_is_back(
    network, driver, finished
):
    network.start(0)
    cut_off = network.start(1)
    driver.inside = network.inside(0)
    environment = {**network.environment, "RAY_ADDRESS": HEAD}
    process = driver.start("resources.num_workers=2", **environment)
    driver.wait_for("train-1-harbour", process)
    assert processes_below(cut_off.process, "RayTrainWorker")
    network.cut()
    before = driver.finished()
    # A node notices by itself, and ends what runs on it.
    wait_until(lambda: cut_off.process.poll() is not None, 300, "the node goes on")
    network.mend()
    network.start(1)
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err
    assert out.count("lost a worker in ") == 1
    assert before.items() <= driver.finished().items()
    metrics = json.loads((driver.run / "metrics.json").read_text())
    assert metrics == finished.metrics("gradient")
