"""Nodes of a Ray cluster, started and lost as machines are."""

import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
from reference.driver import processes_below

RAY = Path(sys.executable).parent / "ray"


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
    """A node as `ray start` makes it."""

    def __init__(self, environment, *arguments, inside=()):
        """`inside` is a command that runs others in a place of its own."""
        command = [*inside, RAY, "start", "--block", "--disable-usage-stats", *arguments]
        # Jobs are submitted to the head's agent, whose usual port another cluster may have.
        own = ["--object-store-memory=100000000", f"--dashboard-agent-listen-port={free_port()}"]
        self.process = psutil.Popen(
            [*command, *own],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def processes(self, title=""):
        """Its processes with a title like this."""
        return processes_below(self.process, title)

    def lose(self):
        """End as a machine does that is taken away: its raylet without a word, and all with it."""
        (raylet,) = [process for process in self.processes() if process.name() == "raylet"]
        raylet.send_signal(signal.SIGKILL)

    def end(self):
        with suppress(psutil.NoSuchProcess):
            left = [*self.process.children(recursive=True), self.process]
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(left, timeout=30)
