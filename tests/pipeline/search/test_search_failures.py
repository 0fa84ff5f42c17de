"""A search that loses the process of a trial."""

import json
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from reference.driver import processes_below
from safetensors import SafetensorError, safe_open

from pipeline.config import loading
from pipeline.storage import artifact

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[3]
SETTINGS = (
    "search.space={protect.0.energy: {type: uniform, low: 0.5, high: 0.95}}",
    "training.epochs=100",
    "resources.checkpoint_minutes=0.0001",
)


class Search:
    """`agcl search` for two trials, in a process and a storage folder of its own."""

    def __init__(self, config, folder):
        self.storage = config.storage.root
        self.folder = self.storage / f"{config.name}-search"
        file = folder / f"{self.storage.name}.yaml"
        file.write_text(loading.dump(config))
        self.command = [sys.executable, "-m", "jobs", "search", str(file), "--trials", "2"]
        self.output = folder / f"{self.storage.name}.txt"

    def start(self):
        with self.output.open("w") as out:
            return subprocess.Popen(self.command, cwd=ROOT, stdout=out, stderr=out)

    def finish(self, process):
        assert process.wait(timeout=900) == 0, self.output.read_text()

    def trials(self):
        """The trials, without the time that they took."""
        return pq.read_table(self.folder / "trials.parquet").drop(["seconds"]).to_pylist()

    def metrics(self):
        return json.loads((self.folder / "best" / "metrics.json").read_text())

    def manifests(self):
        files = (self.storage / "stages").glob("*/manifest.json")
        return {f.parent: artifact.read_manifest(f.parent) for f in files if not f.parent.suffix}


def steps_in(checkpoint):
    """How many steps a checkpoint holds; none where it is not there."""
    with suppress(FileNotFoundError, SafetensorError), safe_open(checkpoint, "pt") as stored:
        return len(json.loads(bytes(stored.get_tensor("steps").numpy())))
    return 0


def writer_of(folder, process):
    """The process below that writes into the folder."""
    for below in processes_below(process):
        with suppress(psutil.Error):
            if any(Path(file.path).is_relative_to(folder) for file in below.open_files()):
                return below
    return None


def kill_in_training(search, process):
    """Kill the process of a trial some way through its training; file and steps of its checkpoint.

    That is the second task's: what is searched changes nothing of the first, which no trial trains.
    """
    while process.poll() is None:
        for checkpoint in (search.storage / "stages").glob("train-2-*.checkpoint"):
            steps = steps_in(checkpoint)
            victim = writer_of(checkpoint.with_suffix(".part"), process)
            if steps > 20 and victim is not None:
                victim.kill()
                return checkpoint, steps_in(checkpoint)
        time.sleep(0.02)
    raise AssertionError(search.output.read_text())


def test_a_trial_that_is_killed_goes_on_at_its_checkpoint(tiny_config, copy_stages, tmp_path):
    undisturbed, disturbed = (
        Search(tiny_config(tmp_path / name, *SETTINGS), tmp_path) for name in ("one", "other")
    )
    undisturbed.finish(undisturbed.start())
    shared = ("tokenizer", "prepare", "pretrain", "train-1", "attribute-1")
    copy_stages(undisturbed.storage, disturbed.storage, shared)
    process = disturbed.start()
    checkpoint, before = kill_in_training(disturbed, process)
    finished = disturbed.manifests()
    while (later := steps_in(checkpoint)) == before:
        assert process.poll() is None, disturbed.output.read_text()
        time.sleep(0.01)
    assert later > before  # From the beginning it would be fewer.
    disturbed.finish(process)
    assert finished.items() <= disturbed.manifests().items()
    assert disturbed.trials() == undisturbed.trials()
    assert disturbed.metrics() == undisturbed.metrics()
    for left in ("*.part", "*.lock", "*.checkpoint", ".ray*"):
        assert not list(disturbed.storage.rglob(left))
