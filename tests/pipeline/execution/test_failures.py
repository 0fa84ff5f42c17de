"""Runs that are killed, interrupted, damaged or diverge, as real processes."""

import json
import shutil
import signal
import time
from pathlib import Path

import chaos
import pytest
from reference.driver import processes_below, wait_until_no_process_is_left

from pipeline.config import loading

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


STOPS = (
    ("pretrain", signal.SIGKILL),
    ("evaluate-0-base", signal.SIGINT),
    ("train-1-harbour", signal.SIGKILL),
    ("attribute-1-harbour", signal.SIGTERM),
    ("train-2-valley", signal.SIGTERM),
    ("evaluate-2-valley", signal.SIGKILL),
    ("report", signal.SIGKILL),
)


@pytest.mark.slow
def test_a_run_stopped_again_and_again_ends_as_the_undisturbed_one(driver, finished):
    before = driver.finished()
    stopped = 0
    for stage, number in STOPS:
        if any(name.startswith(stage) for name in before):
            continue  # By workers that outlived the driver, see below.
        stopped += 1
        code = -number if number == signal.SIGKILL else 130
        assert driver.stop_at(stage, number) == code
        # After SIGKILL the workers go on until they notice, and may finish a stage or two.
        wait_until_no_process_is_left(driver.storage)
        after = driver.finished()
        assert before.items() <= after.items()
        before = after
    assert stopped > len(STOPS) / 2
    code, out, err = driver.finish()
    assert code == 0, err
    assert before.items() <= driver.finished().items()
    assert out.count(" done") == len(driver.finished()) - len(before)
    metrics = json.loads((driver.run / "metrics.json").read_text())
    assert metrics == finished.metrics("gradient")
    assert not list(driver.storage.rglob("*.part"))
    assert not list(driver.storage.rglob(".ray*"))


@pytest.mark.slow
def test_a_worker_killed_in_a_stage_is_started_again(driver, finished):
    before = len(driver.finished())
    process = driver.start()
    for stage in ("train-1", "attribute-1", "evaluate-2"):
        while not (workers := processes_below(process, "RayTrainWorker")):
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        driver.wait_for(stage, process)
        workers[0].kill()
        workers[0].wait(60)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    lost = [line for line in out.splitlines() if "lost a worker in" in line]
    assert [line.split()[4].rstrip(";") for line in lost] == [
        "train/1-harbour",
        "attribute/1-harbour",
        "evaluate/2-valley",
    ]
    assert out.count(" done") == len(driver.finished()) - before
    assert json.loads((driver.run / "metrics.json").read_text()) == finished.metrics("gradient")


@pytest.mark.slow
@pytest.mark.parametrize("kind", chaos.KINDS)
def test_a_kill_at_a_random_moment_changes_nothing(finished, copy_stages, tmp_path, kind):
    """`tests/chaos.py` in small: one kill, against the runs that are finished already."""
    config = loading.dump(finished.configs["gradient"])
    reference, run = (chaos.Run(tmp_path / name, config=config) for name in ("whole", "struck"))
    for stage in finished.runs["gradient"].resolved.values():
        shutil.copytree(stage.folder, reference.storage / "stages" / stage.folder.name)
    shutil.copytree(finished.folder / "gradient", reference.folder, symlinks=True)
    copy_stages(finished.storage, run.storage, ("tokenizer", "prepare"))
    seen = chaos.Seen()
    chaos.strike_again(run, reference, [kind], longest=4, seen=seen)  # Long before its end.
    assert not seen.wrong
    assert seen.kills[kind] == 1


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_random_kills_change_nothing(tmp_path):
    assert chaos.main(["--kills", "3", "--storage", str(tmp_path)]) == 0


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
