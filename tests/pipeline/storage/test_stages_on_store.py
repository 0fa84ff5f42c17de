"""Stages and checkpoints whose artifacts are on an object store, and machines that come and go."""

import zlib

import pytest
import torch
from reference.stored import FINGERPRINT, folder_of, move_to

from pipeline.execution.session import run_stages
from pipeline.plan.stage import Stage, resolve
from pipeline.stages.context import Context
from pipeline.storage import Bucket, object_store
from pipeline.storage import bucket as buckets
from pipeline.storage.object_store import StoreFailed


class Toys:
    """A chain of three stages that count their calls; `after` is called at the end of each."""

    def __init__(self, uri):
        self.uri, self.calls, self.after = uri, [], lambda name: None

    def run(self, config, inputs, out_dir, context):
        self.calls.append(config["name"])
        text = "".join((folder / "out.txt").read_text() for folder in inputs.values())
        (out_dir / "out.txt").write_text(text + config["name"])
        self.after(config["name"])

    def resolved(self):
        stages, last = [], {}
        for name in "abc":
            stages.append(Stage(name, self.run, {"name": name}, last))
            last = {"before": stages[-1]}
        return list(resolve(stages, Bucket(self.uri)).values())

    def start(self):
        self.calls, records = [], []
        try:
            run_stages(self.resolved(), Context(), records.extend)
        except Exception as error:
            return records, error
        return records, None


@pytest.fixture
def toys(bucket):
    return Toys(bucket.uri)


def test_stages_that_another_machine_finished_are_neither_run_nor_downloaded(toys, elsewhere):
    assert toys.start()[1] is None
    assert toys.calls == ["a", "b", "c"]
    elsewhere()
    assert toys.start() == ([], None)
    assert toys.calls == []
    assert not list(Bucket(toys.uri).root.rglob("out.txt"))
    assert [stage.read("out.txt") for stage in toys.resolved()] == [b"a", b"ab", b"abc"]


def test_a_folder_of_results_is_forgotten_with_all_that_is_in_it(bucket, elsewhere):
    """Else the next winner of a search would get the MLflow run of the last one back."""
    storage = Bucket(bucket.uri)
    for name in ("best/config.yaml", "best/mlflow.json", "best/model/a.txt", "best2/config.yaml"):
        file = storage.root / "search" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)
    storage.save_results(storage.root / "search")
    elsewhere()
    storage = Bucket(bucket.uri)
    storage.delete_folder(storage.root / "search" / "best")
    files = [name for name in bucket.names() if not name.endswith("/")]  # pyarrow marks folders.
    assert [name for name in files if "search" in name] == ["search/best2/config.yaml"]


def test_a_stage_downloads_what_it_reads_and_no_more(toys, bucket, elsewhere):
    assert toys.start()[1] is None
    last = toys.resolved()[-1].folder
    bucket.delete(f"stages/{last.name}/manifest.json")
    elsewhere()
    assert toys.start()[1] is None
    assert toys.calls == ["c"]
    assert [stage.folder.exists() for stage in toys.resolved()] == [False, True, True]


def test_an_upload_that_fails_fails_the_stage_and_is_made_good_without_computing_it_again(
    toys, bucket, server
):
    def lose_bucket(name):
        if name == "b":
            for key in bucket.names():
                bucket.delete(key)
            server.client.delete_bucket(Bucket=bucket.name)

    toys.after = lose_bucket
    records, error = toys.start()
    assert isinstance(error, StoreFailed)
    (failed,) = [record for record in records if record.get("state") == "failed"]
    assert failed["error"].startswith(f"storage: {bucket.uri}: ")
    assert "NO_SUCH_BUCKET" in failed["error"]
    assert [stage.folder.exists() for stage in toys.resolved()] == [True, True, False]
    server.client.create_bucket(Bucket=bucket.name)
    buckets._manifest.cache_clear()
    toys.after = lambda name: None
    records, error = toys.start()
    assert error is None
    assert toys.calls == ["c"]
    assert [stage.is_complete() for stage in toys.resolved()] == [True] * 3


def test_a_checkpoint_outlives_its_machine_until_it_is_not_needed(bucket, elsewhere):
    def trained():
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(model.parameters())
        checkpoint = Bucket(bucket.uri).checkpoint(folder_of(bucket.uri), FINGERPRINT, 1e-9)
        return dict(model.named_parameters()), optimizer, checkpoint

    weights, optimizer, checkpoint = trained()
    assert checkpoint.restore(weights, optimizer) == []
    checkpoint.file.parent.mkdir(parents=True)
    weights["weight"].sum().backward()
    optimizer.step()
    checkpoint.write_if_due(weights, optimizer, [({"loss": 0.5}, 1)])
    elsewhere()
    others, optimizer, checkpoint = trained()
    assert not torch.equal(others["weight"], weights["weight"])
    assert checkpoint.restore(others, optimizer) == [({"loss": 0.5}, 1)]
    assert torch.equal(others["weight"], weights["weight"])
    assert optimizer.state[others["weight"]]["step"] == 1
    checkpoint.remove()
    assert not checkpoint.file.exists()
    assert bucket.names() in ([], ["stages/"])  # pyarrow leaves the folder.
    checkpoint.remove()


def test_a_machine_that_a_run_comes_back_to_takes_the_newest_checkpoint(
    bucket, tmp_path, monkeypatch
):
    def modified(self, file):
        """Stores tell times apart by the second."""
        try:
            content = object_store.read(self.uri, self._name(file))
        except FileNotFoundError:
            return 0
        return zlib.crc32(content)

    monkeypatch.setattr(Bucket, "_modified", modified)
    monkeypatch.setattr("agcl.files.checkpoint._MAX_TIME_SHARE", 1e9)

    def go_on(machine, more):
        """Steps before, of training that does `more` steps on a machine."""
        move_to(tmp_path / machine, monkeypatch)
        model = torch.nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(model.parameters())
        checkpoint = Bucket(bucket.uri).checkpoint(folder_of(bucket.uri), FINGERPRINT, 1e-9)
        checkpoint.file.parent.mkdir(parents=True, exist_ok=True)
        weights = dict(model.named_parameters())
        steps = checkpoint.restore(weights, optimizer)
        before = len(steps)
        for step in range(before + 1, before + 1 + more):
            weights["weight"].sum().backward()
            optimizer.step()
            steps.append(({"loss": 0.5}, step))
            checkpoint.write_if_due(weights, optimizer, steps)
        return before

    assert [go_on("one", 1), go_on("two", 4), go_on("one", 1), go_on("one", 0)] == [0, 1, 5, 6]
