"""`run_stages` in this process, without Ray: skip, crash, resume, explain."""

import errno
import gc
import json
import weakref
from contextlib import nullcontext

import pytest
import torch
from safetensors import SafetensorError

from agcl.errors import InputError
from pipeline.execution.failures import explain
from pipeline.execution.session import run_stages
from pipeline.plan.stage import External, Stage, resolve
from pipeline.stages.context import Context
from pipeline.storage import Local, artifact


class Toys:
    """A chain of three stages whose functions count their calls; `fail` names the one to fail."""

    def __init__(self, storage):
        self.storage, self.calls, self.fail = storage, [], {}

    def run(self, config, inputs, out_dir, context):
        name = config["name"]
        self.calls.append(name)
        text = "".join((folder / "out.txt").read_text() for folder in inputs.values())
        (out_dir / "out.txt").write_text(text + name)
        context.log({"loss": 0.5}, 1)
        if name in self.fail:
            raise self.fail[name]

    def resolved(self):
        stages, last = [], {}
        for name in "abc":
            stages.append(Stage(name, self.run, {"name": name}, last))
            last = {"before": stages[-1]}
        return list(resolve(stages, Local(self.storage)).values())

    def start(self):
        """Run as one session does; the records sent by then, also where it fails."""
        self.calls, records = [], []
        try:
            run_stages(self.resolved(), Context(), records.extend)
        except BaseException as error:
            return records, error
        return records, None


@pytest.fixture
def toys(tmp_path):
    return Toys(tmp_path)


def states(records):
    return [(r["artifact"].partition("-")[0], r["state"]) for r in records if "state" in r]


def test_stages_run_in_order_on_each_others_artifacts(toys):
    records, error = toys.start()
    assert error is None
    assert toys.calls == ["a", "b", "c"]
    assert [(w.folder / "out.txt").read_text() for w in toys.resolved()] == ["a", "ab", "abc"]
    assert states(records) == [(n, s) for n in "abc" for s in ("started", "finished")]
    for stage in toys.resolved():
        assert stage.is_complete()
        artifact.verify(stage.folder)


class Cycle:
    def __init__(self):
        self.itself = self


def test_what_a_stage_leaves_in_cycles_is_gone_when_the_next_begins_if_models_are_sharded(toys):
    """As a sharded reference model would be left, on a device whose memory the next stage needs."""
    left, alive, run = [], [], toys.run

    def leaving(*given):
        run(*given)
        alive.append(sum(each() is not None for each in left))
        left.append(weakref.ref(Cycle()))

    toys.run = leaving
    gc.disable()
    try:
        run_stages(toys.resolved(), Context(shard_model=True), lambda records: None)
    finally:
        gc.enable()
    assert alive == [0, 0, 0]


def test_the_manifest_names_the_inputs_with_their_fingerprints(toys):
    toys.start()
    resolved = {stage.name: stage for stage in toys.resolved()}
    manifest = artifact.read_manifest(resolved["b"].folder)
    assert manifest["stage"] == "b"
    assert manifest["config"] == {"name": "b"}
    assert manifest["fingerprint"] == resolved["b"].fingerprint
    assert resolved["a"].fingerprint in json.dumps(manifest["inputs"])


def test_a_second_start_runs_nothing_and_says_nothing(toys):
    toys.start()
    records, error = toys.start()
    assert (records, error, toys.calls) == ([], None, [])


@pytest.mark.parametrize("crash", [RuntimeError("boom"), KeyboardInterrupt(), SystemExit(9)])
def test_after_a_crash_only_the_rest_is_computed(toys, crash):
    toys.fail = {"b": crash}
    _, error = toys.start()
    assert error is crash
    assert toys.calls == ["a", "b"]
    assert [stage.is_complete() for stage in toys.resolved()] == [True, False, False]
    assert not list(toys.storage.rglob("*.part"))
    first = artifact.read_manifest(toys.resolved()[0].folder)
    toys.fail = {}
    _, error = toys.start()
    assert error is None
    assert toys.calls == ["b", "c"]
    assert artifact.read_manifest(toys.resolved()[0].folder) == first
    assert (toys.resolved()[-1].folder / "out.txt").read_text() == "abc"


def test_a_failing_stage_sends_its_error_and_traceback(toys):
    toys.fail = {"b": RuntimeError("no\nluck")}
    records, _ = toys.start()
    assert states(records)[-1] == ("b", "failed")
    failed = records[-1]
    assert failed["error"] == "RuntimeError: no luck"
    assert "in run" in failed["traceback"]
    assert "no\nluck" in failed["traceback"]


def test_metrics_are_sent_before_the_end_and_kept_in_the_artifact(toys):
    records, _ = toys.start()
    of_a = [r for r in records if r["artifact"] == toys.resolved()[0].folder.name]
    assert [r.get("state") or (r["step"], r["loss"]) for r in of_a] == [
        "started",
        (1, 0.5),
        "finished",
    ]
    lines = (toys.resolved()[0].folder / "log.jsonl").read_text().splitlines()
    (line,) = [json.loads(line) for line in lines]
    took = artifact.read_manifest(toys.resolved()[0].folder)["seconds"]
    assert 0 <= line.pop("seconds") <= took + 0.001  # Both are rounded.
    assert line == {"step": 1, "loss": 0.5}


def test_metrics_of_a_failing_stage_are_sent_too(toys):
    toys.fail = {"a": RuntimeError("boom")}
    records, _ = toys.start()
    assert [r.get("state", r.get("loss")) for r in records] == ["started", 0.5, "failed"]


def flip(file):
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    file.write_bytes(data)


def test_a_corrupt_input_is_named_before_the_stage_runs(toys):
    toys.fail = {"b": RuntimeError("boom")}
    toys.start()
    folder = toys.resolved()[0].folder
    flip(folder / "out.txt")
    toys.fail = {}
    records, error = toys.start()
    assert isinstance(error, artifact.CorruptArtifact)
    assert toys.calls == []
    assert states(records)[-1] == ("b", "failed")
    assert str(folder) in records[-1]["error"]
    assert "out.txt" in records[-1]["error"]
    assert [stage.is_complete() for stage in toys.resolved()] == [True, False, False]


def test_a_full_disk_is_one_line_and_leaves_nothing(toys):
    toys.fail = {"b": OSError(errno.ENOSPC, "No space left on device", "/disk/model.safetensors")}
    records, _ = toys.start()
    stage = toys.resolved()[1]
    assert records[-1]["error"] == f"no space left on device for {stage.folder}"
    assert not list(toys.storage.rglob("*.part"))
    assert not stage.folder.exists()


def test_a_disk_that_fills_while_an_artifact_is_sealed_is_one_line_naming_the_stages_folder(
    toys, monkeypatch
):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(artifact.os, "fsync", full)
    records, _ = toys.start()
    stage = toys.resolved()[0]
    assert records[-1]["error"] == f"no space left on device for {stage.folder}"
    assert not stage.folder.exists()
    assert not list(toys.storage.rglob("*.part"))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("row 3\nis empty"), "row 3 is empty"),
        (ArithmeticError("loss nan at step 2"), "loss nan at step 2"),
        (KeyError("w"), "KeyError: 'w'"),
        (torch.OutOfMemoryError("4 GiB"), "training.max_tokens"),
        (MemoryError(), "out of memory: set training.activation_checkpointing, or lower "),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory: set training."),
        (FileNotFoundError(errno.ENOENT, "x", "/a/b"), "No such file or directory: /a/b"),
    ],
)
def test_errors_are_explained_in_one_line(toys, error, said):
    line = explain(error, toys.resolved()[0])
    assert said in line
    assert len(line.splitlines()) == 1


def test_too_large_a_batch_on_the_cpu_says_what_to_lower(toys):
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)
    line = explain(caught.value, toys.resolved()[0])
    assert line.startswith(
        "out of memory: set training.activation_checkpointing, or lower training."
    )
    assert len(line.splitlines()) == 1


def test_a_full_disk_as_safetensors_tells_it_is_one_line(toys):
    error = SafetensorError("Error while serializing: I/O error: No space left on device (28)")
    line = explain(error, toys.resolved()[0])
    assert line.startswith("no space left on device for ")
    assert len(line.splitlines()) == 1


class Trained:
    """One stage of three steps that writes a checkpoint after each; `fail` ends it in the last."""

    def __init__(self, storage):
        self.storage, self.fail, self.begun_at, self.records = storage, None, [], []

    def run(self, config, inputs, out_dir, context):
        weight = torch.nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([weight])
        steps = (
            context.checkpoint.restore({"weight": weight}, optimizer) if context.checkpoint else []
        )
        self.begun_at.append(len(steps))
        for step in range(len(steps) + 1, 4):
            if step == 3 and self.fail:
                raise self.fail
            weight.data += step
            steps.append(({"loss": 0.5, "of_steps": 3}, step))
            if context.checkpoint:
                context.checkpoint.write_if_due({"weight": weight}, optimizer, steps)
        (out_dir / "out.txt").write_text(str(weight.item()))

    def start(self, fail=None, minutes=1e-9):
        self.fail = fail
        resolved = list(resolve([Stage("train/a", self.run, {})], Local(self.storage)).values())
        with pytest.raises(type(fail)) if fail else nullcontext():
            run_stages(resolved, Context(checkpoint_minutes=minutes), self.records.extend)
        return resolved[0].folder


@pytest.fixture
def trained(tmp_path, monkeypatch):
    monkeypatch.setattr("agcl.files.checkpoint._MAX_TIME_SHARE", 1e9)
    return Trained(tmp_path)


@pytest.mark.parametrize("crash", [KeyboardInterrupt(), OSError("No space left on device")])
def test_a_stage_that_was_cut_off_goes_on_at_its_checkpoint(trained, crash):
    folder = trained.start(crash)
    assert [f.name for f in folder.parent.iterdir()] == [folder.name + ".checkpoint"]
    trained.start()
    assert trained.begun_at == [0, 2]
    said = [record for record in trained.records if "note" in record]
    assert said == [{"artifact": folder.name, "note": "resumes after step 2 of 3"}]
    assert (folder / "out.txt").read_text() == "6.0"
    assert [f.name for f in folder.parent.iterdir()] == [folder.name]


def test_a_stage_that_diverged_leaves_no_checkpoint(trained):
    folder = trained.start(ArithmeticError("loss inf"))
    assert not list(folder.parent.iterdir())


def test_no_minutes_mean_no_checkpoints(trained):
    folder = trained.start(KeyboardInterrupt(), minutes=0.0)
    assert not list(folder.parent.iterdir())
    trained.start(minutes=0.0)
    assert trained.begun_at == [0, 0]


def test_the_end_of_a_stage_is_told_without_its_lock(toys):
    """A trial that Tune stops stays in what it tells, and others may need the artifact."""
    locks = []

    def emit(records):
        ends = [record for record in records if record.get("state") == "finished"]
        locks.extend([file.name for file in toys.storage.rglob("*.lock")] for _ in ends)

    run_stages(toys.resolved(), Context(), emit)
    assert locks == [[], [], []]


@pytest.mark.parametrize("when", ["before", "while"])
def test_a_file_that_changed_since_the_command_started_is_refused(tmp_path, when):
    probe = tmp_path / "probe.jsonl"
    probe.write_text("old")

    def copy(config, inputs, out_dir, context):
        (out_dir / "seen").write_text(inputs["probe"].read_text())
        probe.write_text("newer")

    stage = Stage("evaluate/1-x", copy, {}, {"probe": External(probe)})
    (found,) = resolve([stage], Local(tmp_path / "storage")).values()
    if when == "before":
        probe.write_text("new!")
    with pytest.raises(InputError, match=f"{probe} has changed since the command started"):
        run_stages([found], Context(), lambda records: None)
    assert not found.folder.exists()
