"""Runs whose memory is used up in earnest: one line says so, and with room again they go on."""

import json
import os
import resource
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from reference.driver import Driver, processes_below

from pipeline.execution.failures import LESS_MEMORY
from pipeline.execution.workers import LOSSES

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]

MORE = 2 * 2**20
"""Bytes that a worker may take, once it trains, beyond those that it has."""


@pytest.fixture
def kill_when_full():
    """Puts a process where the kernel kills it for taking more memory."""
    first = Path("/sys/fs/cgroup/memory")  # Of the first version of control groups.
    root, limit = (
        (first, "memory.limit_in_bytes")
        if first.is_dir()
        else (Path("/sys/fs/cgroup"), "memory.max")
    )
    group = root / f"agcl-{os.getpid()}"
    try:
        group.mkdir()
        (group / limit).write_text(str(MORE))
    except OSError as error:
        pytest.skip(f"no control group of memory: {error}")
    yield lambda process: (group / "cgroup.procs").write_text(str(process.pid))
    group.rmdir()


def refuse_when_full(process):
    """Let the process get no more memory than a small micro-batch needs."""
    most = process.memory_info().vms + 400 * 2**20
    resource.prlimit(process.pid, resource.RLIMIT_AS, (most, most))


@pytest.fixture
def long_rows(tiny_config, tmp_path):
    """Drives a run whose micro-batch takes more than a gigabyte."""
    for split, number in (("train", 64), ("test", 4)):
        rows = [
            json.dumps({"prompt": f"{i} and " + "so on and on " * 28, "answer": f" {i % 7}"})
            for i in range(number)
        ]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows))
    config = tiny_config(
        tmp_path / "storage",
        f"tasks={{format: jsonl, sequence: [{{path: {tmp_path}}}]}}",
        "training={epochs: 1, batch_size: 64, micro_batch_size: 64}",
        method="sequential",
    )
    return Driver(config, config.storage.root, tmp_path)


def squeezed(driver, squeeze, stage, *settings):
    """Start the run and squeeze every worker from a stage on; exit code, output and errors."""
    process, done = driver.start(*settings), set()
    driver.wait_for(stage, process)
    while process.poll() is None:
        for worker in processes_below(process, "RayTrainWorker"):
            with suppress(OSError, psutil.Error):
                if worker.pid not in done:
                    squeeze(worker)
                    done.add(worker.pid)
        time.sleep(0.02)
    return process.returncode, *process.communicate()


def check_line(code, err):
    assert code == 1, err
    (line,) = err.splitlines()
    assert line.startswith("agcl: stage "), line
    assert "failed: out of memory" in line
    assert LESS_MEMORY in line
    assert Path(line.rpartition("(log: ")[2].rstrip(")")).read_text()


def check_goes_on(driver, finished):
    before = driver.finished()
    code, _, err = driver.finish()
    assert code == 0, err
    assert before.items() <= driver.finished().items()
    metrics = json.loads((driver.run / "metrics.json").read_text())
    assert metrics == finished.metrics("gradient")
    for left in ("*.part", "*.lock", "*.checkpoint", ".ray*"):
        assert not list(driver.storage.rglob(left))


def test_a_worker_that_the_kernel_kills_again_and_again(driver, finished, kill_when_full):
    code, out, err = squeezed(driver, kill_when_full, "pretrain")
    check_line(code, err)
    assert out.count("lost a worker in ") == LOSSES - 1
    assert len(out.splitlines()) < 40
    check_goes_on(driver, finished)


def test_a_worker_that_is_refused_memory_gets_on_with_a_smaller_micro_batch(long_rows):
    code, _, err = squeezed(long_rows, refuse_when_full, "train-1")
    check_line(code, err)
    assert "stage train/1-" in err
    before = long_rows.finished()
    # Another config needs another name; what it changes nothing of is shared.
    lowered = ("training.micro_batch_size=2", "name=lowered")
    code, _, err = squeezed(long_rows, refuse_when_full, "train-1", *lowered)
    assert code == 0, err
    assert before.items() <= long_rows.finished().items()


def test_a_node_so_short_of_memory_that_ray_ends_all_processes_on_it(driver, finished):
    code, _, err = driver.finish(RAY_memory_usage_threshold="0.01")
    check_line(code, err)
    check_goes_on(driver, finished)
