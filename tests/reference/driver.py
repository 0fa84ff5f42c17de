"""`agcl run` in a separate process that tests can kill, starve and interrupt."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from pipeline.config import loading
from pipeline.storage import artifact

ROOT = Path(__file__).parent.parent.parent


class Driver:
    """`agcl run` on the config of a finished run, in a separate process and storage."""

    def __init__(self, config, storage, folder):
        self.settings, self.config = config, folder / "config.yaml"
        self.inside: list[str] = []
        """A command that runs another in an isolated environment."""
        self.move_to(storage)

    def move_to(self, storage):
        """Use another storage folder."""
        self.storage, self.run = storage, storage / self.settings.name
        moved = self.settings.model_copy(update={"storage": storage})
        self.config.write_text(loading.dump(moved))

    def start(self, *settings, **environment):
        return subprocess.Popen(
            [*self.inside, sys.executable, "-m", "jobs", "run", str(self.config), *settings],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # A test run in the background ignores SIGINT, and this process would inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    def finish(self, *settings, **environment):
        """Run to the end: the exit code and what was printed, or fail with where it hangs."""
        process = self.start(*settings, **environment)
        try:
            out, err = process.communicate(timeout=500)  # Less than the timeout of its tests.
        except subprocess.TimeoutExpired:
            stacks = where(process)
            for below in processes_below(process):
                with suppress(psutil.Error):
                    below.kill()
            process.kill()
            out, err = process.communicate(timeout=60)
            pytest.fail(f"no end after 500 s:\n{out}\n{err}\n{stacks}")
        return process.returncode, out, err

    def wait_for(self, stage, process):
        """Wait until the stage writes its artifact."""
        deadline = time.monotonic() + 600
        while not list((self.storage / "stages").glob(f"{stage}-*.part")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, f"{stage} never started"
            time.sleep(0.02)

    def stop_at(self, stage, number, *settings):
        """Send a signal as soon as the stage writes its artifact; return the exit code."""
        process = self.start(*settings)
        self.wait_for(stage, process)
        process.send_signal(number)
        process.communicate(timeout=60)
        return process.returncode

    def finished(self):
        """Manifests of the finished artifacts, by folder."""
        folders = (self.storage / "stages").glob("*")
        manifests = {f.name: artifact.read_manifest(f) for f in folders if not f.suffix}
        return {name: manifest for name, manifest in manifests.items() if manifest is not None}


def processes_below(process, title=""):
    """Descendants of a process whose title contains a text."""
    found = []
    with suppress(psutil.NoSuchProcess):
        for below in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.Error):
                if title in " ".join(below.cmdline()):
                    found.append(below)
    return found


def where(process):
    """Stacks of the Python threads of a process and of all below it."""
    py_spy = Path(sys.executable).with_name("py-spy")
    found = []
    for each in [process, *processes_below(process)]:
        dump = subprocess.run(
            [py_spy, "dump", "--pid", str(each.pid)], capture_output=True, text=True, timeout=60
        )
        found.append(dump.stdout or f"{each.pid}: {dump.stderr}")
    return "\n".join(found)


def wait_until_no_process_is_left(storage):
    deadline = time.monotonic() + 60
    while left := processes_that_name(str(storage)) + processes_in(storage):
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def processes_that_name(text):
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            if text in command and int(folder.name) != os.getpid():
                found.append(command)
    return found


def processes_in(storage):
    """Processes with an open file below the folder."""
    found = []
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            if str(link.readlink()).startswith(str(storage)):
                found.append(str(link))
    return found
