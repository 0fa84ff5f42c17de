"""Tiny configs, and one set of runs on a real Ray cluster that several modules look at."""

import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from reference.driver import Driver
from reference.stored import move_to
from rich.console import Console

from pipeline.config import loading
from pipeline.execution.session import run_stages
from pipeline.run import execute, open_run
from pipeline.stages.context import Context
from pipeline.storage import object_store

TINY = """
name: {name}
method: agcl
tasks: {{format: facts, count: 2, entities: 3}}
model: {{pretraining: {{entities: 8, epochs: 8}}}}
training: {{epochs: 12, batch_size: 8, micro_batch_size: 4, learning_rate: 1.5e-3}}
importance: {{batch_size: 5}}
base: {{samples: 2, tokens: 8}}
evaluation: {{batch_size: 5}}
"""
"""Two tasks of twelve facts: enough to learn them, and to forget some of the first."""
SECRETS = ("HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY", "MY_API_KEY")
"""Set while the finished runs run; nothing that they leave may hold them."""


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory):
    """Makes a tiny config in a storage folder, with overrides."""

    def make(storage, *overrides, name="tiny", method=None):
        file = tmp_path_factory.mktemp("config") / "config.yaml"
        file.write_text(TINY.format(name=name))
        return loading.load(file, [f"storage={storage}", *overrides], method=method)

    return make


def _copy_stages(source, target, prefixes):
    for folder in (source / "stages").iterdir():
        if folder.name.startswith(prefixes) and folder.is_dir():
            shutil.copytree(folder, target / "stages" / folder.name)


@pytest.fixture(scope="session")
def copy_stages():
    """Copies the artifacts of stages, by how their folders begin, from one storage to another."""
    return _copy_stages


@pytest.fixture(scope="session")
def run_in_process():
    """Runs a config's missing stages without Ray; gives the resolved stages by name."""

    def run(config):
        config.storage.root.mkdir(parents=True, exist_ok=True)
        resolved = open_run(config).resolved
        run_stages(list(resolved.values()), Context(ray_data=False), lambda records: None)
        return resolved

    return run


@pytest.fixture(scope="session")
def run_configs():
    """Runs configs by label together as `agcl compare` does; results by label and the output."""

    def run(named, folder):
        runs = {label: open_run(config, folder / label) for label, config in named.items()}
        out = io.StringIO()
        folder.mkdir(parents=True, exist_ok=True)
        results = execute(
            runs, folder, title="tiny", command="agcl test", console=Console(file=out, width=200)
        )
        return runs, dict(zip(runs, results, strict=True)), out.getvalue()

    return run


@pytest.fixture(scope="session")
def finished(tiny_config, run_configs, tmp_path_factory):
    """Three methods over one tiny sequence, run together on Ray, tracked in sqlite.

    Only `solo` protects the base model, so the others share their first task with its solo model.
    """
    root = tmp_path_factory.mktemp("finished")
    storage = root / "storage"
    gate = ["protect.0.kind=gate", "protect.0.on=gradient", "base.protect=none"]
    both = ["protect=[{kind: gate, strength: 0.5}, {kind: project, energy: 0.8}]"]
    named = {
        "sequential": tiny_config(storage, method="sequential"),
        "gradient": tiny_config(storage, *gate),
        "solo": tiny_config(storage, *both, "importance.source=solo"),
    }
    secrets = {name: f"s3cr3t-of-{name}" for name in SECRETS}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in secrets.items():
            patch.setenv(name, value)
        runs, results, output = run_configs(named, root / "comparison")
    return SimpleNamespace(
        root=root,
        storage=storage,
        folder=root / "comparison",
        configs=named,
        runs=runs,
        results=results,
        output=output,
        secrets=secrets,
        console=lambda: Console(file=io.StringIO(), width=200),
        left=sorted(storage.iterdir()) + sorted((storage / "stages").iterdir()),
        artifact=lambda label, stage: runs[label].resolved[stage].folder,
        metrics=lambda label: read_json(root / "comparison" / label / "metrics.json"),
    )


@pytest.fixture
def undrawn(monkeypatch):
    """Reports without what their figures show, which takes most of their time."""
    blank = '<?xml version="1.0"?><svg viewBox="0 0 1 1"></svg>'
    monkeypatch.setattr("pipeline.results.figures.svg", lambda figure, file: blank)


@pytest.fixture
def driver(finished, copy_stages, tmp_path):
    """Drives the run `gradient` in its own process, from nothing but its prepared rows."""
    driver = Driver(finished.configs["gradient"], tmp_path / "storage", tmp_path)
    copy_stages(finished.storage, driver.storage, ("tokenizer", "prepare"))
    return driver


@pytest.fixture(scope="session")
def server():
    """A real server of the S3 protocol."""
    from reference.object_store import Server  # Imports that few tests need.

    server = Server()
    yield server
    server.close()


@pytest.fixture
def bucket(server, monkeypatch, tmp_path):
    """A new bucket, and an empty cache on this machine."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(object_store, "_PAUSES", (0.0, 0.0))
    move_to(tmp_path / "one", monkeypatch)
    return server.bucket()


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """Go on as on another machine."""
    return lambda: move_to(tmp_path / "two", monkeypatch)


def read_json(file: Path):
    return json.loads(file.read_text(encoding="utf-8"))
