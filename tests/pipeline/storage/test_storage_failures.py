"""A storage folder that is full, read-only, shared, or dated in the future."""

import io
import json
import os
import subprocess
import time

import pytest
from rich.console import Console

from jobs import cli
from pipeline.config import loading
from pipeline.plan.schedule import sessions
from pipeline.run import execute, open_run
from pipeline.storage import Local, artifact

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


class Disk:
    """A small file system of its own, in memory."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()

    def mount(self, options):
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.folder)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting needs root")

    def remount(self, options):
        subprocess.run(["mount", "-o", f"remount,{options}", str(self.folder)], check=True)

    def unmount(self):
        subprocess.run(["umount", "--lazy", str(self.folder)], capture_output=True, check=False)


@pytest.fixture
def disk(tmp_path):
    disk = Disk(tmp_path / "disk")
    yield disk
    disk.unmount()


def run_job(config, folder, capsys):
    """Exit code and lines on stderr of `agcl run` in this process."""
    file = folder / "config.yaml"
    file.write_text(loading.dump(config))
    code = cli.main(["run", str(file)])
    return code, capsys.readouterr().err.splitlines()


def test_a_read_only_disk_ends_before_any_work(disk, tiny_config, tmp_path, capsys):
    disk.mount("size=1m,ro")
    code, lines = run_job(tiny_config(disk.folder / "storage"), tmp_path, capsys)
    said = f"agcl: storage: cannot make {disk.folder / 'storage'} (Read-only file system)"
    assert (code, lines) == (2, [said])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_ends_before_any_work(tiny_config, tmp_path, capsys):
    storage = tmp_path / "storage"
    storage.mkdir(mode=0o555)
    code, lines = run_job(tiny_config(storage), tmp_path, capsys)
    assert (code, lines) == (2, [f"agcl: storage: {storage} cannot be written to"])


@pytest.mark.slow
def test_a_disk_that_fills_up_is_one_line_and_with_more_room_the_run_goes_on(
    disk, driver, finished, copy_stages
):
    disk.mount("size=10m")
    driver.move_to(disk.folder / "storage")
    copy_stages(finished.storage, driver.storage, ("tokenizer", "prepare"))
    code, _, err = driver.finish()
    assert code == 1
    (line,) = err.splitlines()
    assert line.startswith("agcl: stage ")
    assert "no space left on device" in line.lower()
    before = driver.finished()
    disk.remount("size=200m")
    code, _, err = driver.finish()
    assert code == 0, err
    assert before.items() <= driver.finished().items()
    metrics = json.loads((driver.run / "metrics.json").read_text())
    assert metrics == finished.metrics("gradient")
    assert not list(driver.storage.rglob("*.part"))


@pytest.mark.slow
def test_of_two_equal_commands_one_waits_and_nothing_is_computed_twice(driver):
    both = [driver.start() for _ in range(2)]
    outputs = []
    for process in both:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        outputs.append(out)
    prepared = [name for name in driver.finished() if name.startswith(("tokenizer", "prepare"))]
    computed = len(driver.finished()) - len(prepared)
    assert sorted(out.count(" done ") for out in outputs) == [0, computed]
    (waited,) = [out for out in outputs if "waiting for another command" in out]
    assert "every stage is complete already" in waited
    assert not list(driver.storage.rglob("*.lock"))


def test_dates_in_the_future_do_not_matter(finished, tiny_config, copy_stages, tmp_path):
    storage = tmp_path / "storage"
    copy_stages(finished.storage, storage, ("",))
    year = time.time() + 365 * 24 * 3600
    for file in storage.rglob("*"):
        os.utime(file, (year, year))
    run = open_run(tiny_config(storage, method="sequential"))
    assert sessions({"run": run.plan.stages}, Local(storage)) == []
    for stage in run.resolved.values():
        artifact.verify(stage.folder)


def test_a_clock_that_is_set_back_gives_no_negative_times(tmp_path, monkeypatch):
    with artifact.writing(tmp_path / "toy", {"fingerprint": "f00d"}):
        monkeypatch.setattr(time, "time", lambda: 0.0)
    assert 0 <= artifact.read_manifest(tmp_path / "toy")["seconds"] < 60


@pytest.fixture
def complete(finished, tiny_config, copy_stages, tmp_path, undrawn):
    """A run of which every stage is there, and nothing else yet."""
    storage = tmp_path / "storage"
    copy_stages(finished.storage, storage, ("",))
    return open_run(tiny_config(storage, "tracking.enabled=false", method="sequential"))


def execute_quietly(run):
    console = Console(file=io.StringIO(), width=200)
    execute({"run": run}, run.folder, title="tiny", command="agcl test", console=console)
    return console.file.getvalue()


def test_what_a_kill_left_beside_finished_stages_is_removed(complete):
    folder = complete.resolved["train/1-harbour"].folder
    for left in ("lock", "checkpoint", "checkpoint.part"):
        (folder.parent / f"{folder.name}.{left}").touch()
    scratch = complete.folder / ".ray-train" / "session"
    scratch.mkdir(parents=True)
    complete.folder.with_name(f"{complete.folder.name}.lock").touch()
    said = execute_quietly(complete)
    assert "waiting" not in said  # Nobody holds that lock.
    storage = complete.config.storage.root
    assert not [*storage.rglob("*.lock"), *storage.rglob("*.part"), *storage.rglob(".ray*")]
    assert not [*storage.rglob("*.checkpoint*")]


def test_a_folder_taken_by_another_config_meanwhile_is_not_overwritten(complete, tiny_config):
    late = open_run(
        tiny_config(complete.config.storage, "seed=1", "tracking.enabled=false")
    )  # While the folder was free.
    execute_quietly(complete)
    before = (complete.folder / "config.yaml").read_text()
    with pytest.raises(ValueError, match=r"holds a run with .*seed=0, not 1"):
        execute_quietly(late)
    assert (complete.folder / "config.yaml").read_text() == before


def test_whether_a_storage_can_be_made_is_found_without_making_it(tmp_path, monkeypatch):
    """Another first command may be making it, and would lose it again."""
    made, mkdir = [], os.mkdir
    monkeypatch.setattr(
        os, "mkdir", lambda path, *rest: made.append(str(path)) or mkdir(path, *rest)
    )
    Local(tmp_path / "new" / "storage").check_writable()
    assert made
    assert not {str(tmp_path / "new"), str(tmp_path / "new" / "storage")} & {*made}
    assert list(tmp_path.iterdir()) == []
