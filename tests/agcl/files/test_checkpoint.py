"""Checkpoints within a task: resumed training ends as if it had not been interrupted."""

import math

import pytest
import torch
from reference import tiny
from reference import workers as remote
from reference.variants import slow

from agcl.files import checkpoint as checkpoints
from agcl.files.checkpoint import Checkpoint
from agcl.modulation import GatedAdamW, GatedSGD
from agcl.train import train_task

OPTIONS = {
    "epochs": 3,
    "batch_size": 4,
    "micro_batch_size": 2,
    "seed": 5,
    "schedule": "cosine",
    "warmup": 0.3,
}
STEPS = 9


class Interrupted(BaseException):
    pass


class CountedRows(list):
    """Rows that count how often they are read."""

    reads = 0

    def __getitem__(self, index):
        self.reads += 1
        return super().__getitem__(index)


@pytest.fixture
def every_step(monkeypatch):
    """Lift the limit on the time spent writing checkpoints."""
    monkeypatch.setattr(checkpoints, "_MAX_TIME_SHARE", math.inf)


def protected(optimizer="adamw"):
    """A model with dropout, and an optimizer with every kind of state."""
    model = tiny.llama(dropout=0.5, width=64 if optimizer == "adamw_8bit" else 16)
    model.model.embed_tokens.weight.requires_grad_(False)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gate = {n: torch.rand(p.shape, generator=torch.manual_seed(1)) for n, p in trained.items()}
    if optimizer == "sgd":
        return model, GatedSGD(trained.items(), lr=1e-2, gate=gate)
    eight_bit = optimizer == "adamw_8bit"
    return model, GatedAdamW(trained.items(), lr=1e-2, gate=gate, eight_bit=eight_bit)


def train(checkpoint=None, *, stop=None, rows=None, optimizer="adamw"):
    """Train from scratch, optionally up to a step; return weights, log and number of rows read."""
    model, optimizer = protected(optimizer)
    rows = CountedRows(rows or tiny.random_rows(10))
    logged = []

    def log(metrics, step):
        logged.append((dict(metrics), step))

    def penalise():
        if stop is not None and len(logged) == stop:
            raise Interrupted
        return torch.zeros(())

    interrupted = False
    try:
        train_task(
            model, rows, optimizer, checkpoint=checkpoint, penalise=penalise, log=log, **OPTIONS
        )
    except Interrupted:
        interrupted = True
    assert interrupted == (stop is not None)
    return {n: p.detach().clone() for n, p in model.named_parameters()}, logged, rows.reads


def make(folder, identity="a task", seconds=0.0):
    return Checkpoint(folder / "of-a-task.checkpoint", identity, seconds)


def assert_same(found, expected):
    assert found[1] == expected[1]
    for name, weight in expected[0].items():
        assert torch.equal(found[0][name], weight), name


@pytest.mark.parametrize("stop", [4, *slow(1, 8)])
def test_interrupted_training_resumes_bit_for_bit(tmp_path, every_step, stop):
    whole = train()
    train(make(tmp_path), stop=stop)
    assert [file.name for file in tmp_path.iterdir()] == ["of-a-task.checkpoint"]
    rest = train(make(tmp_path))
    assert_same(rest, whole)
    # Ten rows per epoch: four, four and two.
    assert rest[2] == 30 - [0, 4, 8, 10, 14, 18, 20, 24, 28][stop]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw_8bit"])
def test_the_state_of_other_optimizers_is_resumed_too(tmp_path, every_step, optimizer):
    whole = train(optimizer=optimizer)
    train(make(tmp_path), stop=4, optimizer=optimizer)
    rest = train(make(tmp_path), optimizer=optimizer)
    assert_same(rest, whole)
    assert rest[2] == 30 - 14  # It went on from step 4.


def test_training_can_be_interrupted_repeatedly(tmp_path, every_step):
    whole = train()
    for stop in (2, 5, 7):
        train(make(tmp_path), stop=stop)
    assert_same(train(make(tmp_path)), whole)


def test_a_finished_task_is_not_trained_again(tmp_path, every_step):
    whole = train(make(tmp_path))
    again = train(make(tmp_path))
    assert_same(again, whole)
    assert again[2] == 0


@pytest.mark.parametrize("damage", ["identity", "flipped", *slow("cut", "importance", "empty")])
def test_damaged_and_foreign_checkpoints_are_ignored(tmp_path, every_step, damage):
    whole = train()
    train(make(tmp_path, "another task" if damage == "identity" else "a task"), stop=4)
    (file,) = tmp_path.iterdir()
    content = bytearray(file.read_bytes())
    if damage == "cut":
        file.write_bytes(content[:-7])
    if damage == "flipped":
        content[-7] ^= 1
        file.write_bytes(content)
    if damage == "importance":
        from agcl.importance import Importance

        Importance({"a": torch.ones(1, 2)}).save(file)
    if damage == "empty":
        file.write_bytes(b"")
    again = train(make(tmp_path))
    assert_same(again, whole)
    assert again[2] == 30


def test_a_full_disk_loses_the_checkpoint_but_not_the_training(tmp_path, every_step, monkeypatch):
    def disk_full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    whole = train()
    train(make(tmp_path), stop=4)
    monkeypatch.setattr(checkpoints.tensor_file, "save_file", disk_full)
    said = []
    checkpoint = make(tmp_path)
    checkpoint.warn = said.append
    assert_same(train(checkpoint), whole)
    assert not list(tmp_path.iterdir())
    assert said[0] == "no space left for a checkpoint; the last one was deleted"


def test_any_other_error_keeps_the_last_checkpoint_and_is_told(tmp_path, every_step, monkeypatch):
    def broken(tensors, path, metadata):
        raise OSError("Input/output error")

    whole = train()
    train(make(tmp_path), stop=4)
    content = make(tmp_path).file.read_bytes()
    monkeypatch.setattr(checkpoints.tensor_file, "save_file", broken)
    said = []
    checkpoint = make(tmp_path)
    checkpoint.warn = said.append
    assert_same(train(checkpoint), whole)
    assert checkpoint.file.read_bytes() == content
    assert said[0] == "cannot write a checkpoint (Input/output error); the last one is kept"


def test_writing_takes_at_most_a_twentieth_of_the_time(tmp_path, monkeypatch):
    """Steps take 1 s, checkpoints 3 s: one per minute, although one per second is requested."""
    now = [0.0]
    written = []

    def write(file, *of):
        now[0] += 3
        written.append(now[0])

    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(checkpoints.tensor_file, "write", write)
    checkpoint = make(tmp_path, seconds=1.0)
    for _ in range(200):
        now[0] += 1
        checkpoint.write_if_due({}, torch.optim.SGD([torch.zeros(1)]), [])
    assert written == [4, 67, 130, 193]


def test_two_ranks_resume_together_although_only_one_sees_the_file(workers, tmp_path):
    """The second rank gets another folder, as if its node did not share the disk."""
    rows = tiny.random_rows(10)
    whole = workers.run(remote.train_rows, rows, {}, **OPTIONS)
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    stopped = workers.run(remote.train_with_checkpoint, rows, folders, stop=5, **OPTIONS)
    assert [len(losses) for losses, _ in stopped] == [5, 5]
    assert [len(list(folder.iterdir())) for folder in folders] == [1, 0]
    rest = workers.run(remote.train_with_checkpoint, rows, folders, **OPTIONS)
    for (losses, weights), (expected, expected_weights) in zip(rest, whole, strict=True):
        assert losses == expected
        for name, weight in expected_weights.items():
            assert torch.equal(weights[name], weight), name


def test_dropout_is_the_same_on_two_ranks(workers):
    rows = tiny.random_rows(10)
    alone, _ = remote.train_rows(rows, {"dropout": 0.5}, **OPTIONS)
    assert alone != pytest.approx(remote.train_rows(rows, {}, **OPTIONS)[0], rel=1e-3)
    for losses, _ in workers.run(remote.train_rows, rows, {"dropout": 0.5}, **OPTIONS):
        assert losses == pytest.approx(alone, rel=1e-4)
