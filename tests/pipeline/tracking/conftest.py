"""A finished run, replayed stage by stage: the mirror sees what a driver would, without Ray."""

import io
import json
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from types import SimpleNamespace

import pytest
from rich.console import Console

from pipeline.results.run_folder import open_folder
from pipeline.run import open_run
from pipeline.storage.storage import default_uri
from pipeline.tracking.sync import Mirror


@pytest.fixture(scope="session")
def raced(tmp_path_factory):
    """An MLflow database that two processes make where a third was killed while making it."""
    storage = tmp_path_factory.mktemp("raced")
    with closing(sqlite3.connect(storage / "mlflow.db.part")) as half:
        half.execute("CREATE TABLE runs (half_made)")
    (storage / "mlflow.db.lock").touch()
    code = "import sys; from pathlib import Path; from pipeline.tracking.tracker import Tracker\n"
    code += "Tracker(Path(sys.argv[1]), None)"
    one, two = (subprocess.Popen([sys.executable, "-c", code, storage]) for _ in range(2))
    codes = one.wait(), two.wait()
    return SimpleNamespace(codes=codes, files=sorted(storage.iterdir()), file=storage / "mlflow.db")


@pytest.fixture(scope="session")
def original(tiny_config, run_in_process, tmp_path_factory):
    """A run computed in this process."""
    root = tmp_path_factory.mktemp("original")
    gate = ["protect.0.kind=gate", "protect.0.on=gradient", "base.protect=none"]
    gate.append("training.epochs=4")
    resolved = run_in_process(tiny_config(root / "storage", *gate))
    return SimpleNamespace(resolved=resolved, settings=gate)


class Replay:
    """The original run's stages, finished one by one in another storage."""

    def __init__(self, original, config_of, storage):
        self.original, self.config_of, self.storage = original, config_of, storage
        self.output = io.StringIO()
        self.console = Console(file=self.output, width=60)
        self.use(None)

    def use(self, uri, *settings):
        """Use another MLflow, or other settings."""
        where = [f"tracking.uri={uri}"] if uri else []
        self.uri = uri or default_uri(self.storage)
        config = self.config_of(self.storage, *self.original.settings, *where, *settings)
        self.run = open_run(config)
        open_folder(self.run)

    def mirror(self):
        return Mirror(self.run.config, self.run.folder, "tiny", self.console)

    def said(self):
        """Lines printed so far."""
        return [line.strip() for line in self.output.getvalue().splitlines()]

    def metrics(self, stage):
        """The records of a stage's log."""
        found = self.original.resolved[stage]
        lines = (found.folder / "log.jsonl").read_text().splitlines()
        return [{"artifact": found.folder.name, **json.loads(line)} for line in lines]

    def state(self, stage, state, **more):
        return {"artifact": self.run.resolved[stage].folder.name, "state": state, **more}

    def complete(self, *kinds):
        """Finish the stages whose names start with these, unobserved."""
        for stage, found in self.run.resolved.items():
            if stage.startswith(kinds) and not found.folder.exists():
                shutil.copytree(self.original.resolved[stage].folder, found.folder)

    def play(self, mirror, *kinds):
        """Run the stages whose names start with these, observed."""
        for stage in [stage for stage in self.run.resolved if stage.startswith(kinds)]:
            mirror.observe([self.state(stage, "started")])
            mirror.observe(self.metrics(stage))
            self.complete(stage)
            mirror.observe([self.state(stage, "finished")])

    def finish(self, mirror):
        report = self.run.resolved["report"].folder / "metrics.json"
        mirror.sync(now=True)
        files = {"metrics.json": report}
        mirror.finish_run("tiny", json.loads(report.read_text()), files, "what came of it")


@pytest.fixture
def replay(original, raced, tiny_config, tmp_path):
    storage = tmp_path / "storage"
    storage.mkdir()
    shutil.copy(raced.file, storage)  # Making one takes seconds.
    return Replay(original, tiny_config, storage)
