"""Runs that are killed, interrupted, damaged or diverge, as real processes."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from agcl.importance import Importance
from pipeline import artifact, loading

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

ROOT = Path(__file__).parent.parent.parent


class Driver:
    """`agcl run` on the config of one of the finished runs, in its own process and storage."""

    def __init__(self, config, storage, folder):
        self.storage, self.run = storage, storage / config.name
        self.config = folder / "config.yaml"
        self.config.write_text(loading.dump(config.model_copy(update={"storage": storage})))

    def start(self, *settings):
        return subprocess.Popen(
            [sys.executable, "-m", "jobs", "run", str(self.config), *settings],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # A test run that a shell put into the background ignores SIGINT, and so would this.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    def finish(self, *settings):
        process = self.start(*settings)
        out, err = process.communicate(timeout=300)
        return process.returncode, out, err

    def stop_at(self, stage, number):
        """Send a signal as soon as the stage writes its artifact; the exit code."""
        process = self.start()
        stages = self.storage / "stages"
        deadline = time.monotonic() + 240
        while not list(stages.glob(f"{stage}-*.part")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, f"{stage} never started"
            time.sleep(0.02)
        process.send_signal(number)
        process.communicate(timeout=60)
        return process.returncode

    def finished(self):
        """Manifests of the finished artifacts by folder."""
        folders = (self.storage / "stages").glob("*")
        manifests = {f.name: artifact.read_manifest(f) for f in folders if not f.suffix}
        return {name: manifest for name, manifest in manifests.items() if manifest is not None}


@pytest.fixture
def driver(finished, copy_stages, tmp_path):
    """Drives the run `gradient`, from nothing but its prepared rows."""
    driver = Driver(finished.configs["gradient"], tmp_path / "storage", tmp_path)
    copy_stages(finished.storage, driver.storage, ("tokenizer", "prepare"))
    return driver


@pytest.mark.parametrize(
    "stops",
    [
        [("train-1-harbour", signal.SIGKILL)],
        pytest.param(
            [
                ("pretrain", signal.SIGKILL),
                ("evaluate-0-base", signal.SIGINT),
                ("train-1-harbour", signal.SIGKILL),
                ("attribute-1-harbour", signal.SIGTERM),
                ("train-2-valley", signal.SIGTERM),
                ("evaluate-2-valley", signal.SIGKILL),
                ("report", signal.SIGKILL),
            ],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_stopped_again_and_again_ends_as_the_undisturbed_one(driver, finished, stops):
    before = driver.finished()
    for stage, number in stops:
        code = -number if number == signal.SIGKILL else 130
        assert driver.stop_at(stage, number) == code
        # After SIGKILL the workers go on until they notice, and may finish a stage or two.
        wait_until_no_process_is_left(driver.storage)
        after = driver.finished()
        assert before.items() <= after.items()
        before = after
    code, out, err = driver.finish()
    assert code == 0, err
    assert before.items() <= driver.finished().items()
    assert out.count(" done") == len(driver.finished()) - len(before)
    metrics = json.loads((driver.run / "metrics.json").read_text())
    assert metrics == finished.metrics("gradient")
    assert not list(driver.storage.rglob("*.part"))
    assert not list(driver.storage.rglob(".ray*"))


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
    """Processes that have a file below the folder open."""
    found = []
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            if str(link.readlink()).startswith(str(storage)):
                found.append(str(link))
    return found


def test_two_workers_give_what_one_gives(driver, finished):
    code, _, err = driver.finish("resources.num_workers=2")
    assert code == 0, err
    two = json.loads((driver.run / "metrics.json").read_text())
    assert two == finished.metrics("gradient")
    for stage in ("pretrain", "train-1-harbour", "train-2-valley"):
        one, two = (
            [json.loads(line)["loss"] for line in (run / stage / "log.jsonl").open()]
            for run in (finished.folder / "gradient", driver.run)
        )
        assert len(one) > 1
        assert two == pytest.approx(one, rel=1e-5)
    one, two = (
        Importance.load(run / "attribute-1-harbour" / "importance.safetensors").entries
        for run in (finished.folder / "gradient", driver.run)
    )
    for name, entry in one.items():
        torch.testing.assert_close(two[name], entry, rtol=0.02, atol=1e-7)  # Stored in bfloat16.


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_run_with_one_line(driver, finished, copy_stages):
    copy_stages(finished.storage, driver.storage, ("pretrain", "evaluate-0"))
    code, _, err = driver.finish("training.learning_rate=1e30")
    assert code == 1
    (line,) = err.splitlines()
    assert line.startswith("agcl: stage train/1-harbour failed: ")
    assert "loss" in line
    log = Path(line.rpartition("(log: ")[2].rstrip(")"))
    assert "Traceback" in log.read_text()
    assert not list((driver.storage / "stages").glob("train-*"))


@pytest.mark.slow
def test_a_damaged_artifact_is_named_and_not_built_upon(driver, finished, copy_stages):
    copy_stages(finished.storage, driver.storage, ("pretrain",))
    (model,) = (driver.storage / "stages").glob("pretrain-*/model.safetensors")
    content = bytearray(model.read_bytes())
    content[-1] ^= 1
    model.write_bytes(content)
    code, _, err = driver.finish()
    assert code == 1
    assert len(err.splitlines()) == 1
    assert str(model.parent) in err
    assert "model.safetensors is not what was written" in err
    model.write_bytes(content[:-1])
    code, _, err = driver.finish()
    assert code == 2
    assert str(model.parent) in err
    assert len(err.splitlines()) == 1
