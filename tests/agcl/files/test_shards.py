"""Checkpoints of a sharded model: written without gathering, read by any number of ranks."""

import shutil

import pytest
import torch
from reference import sharded, tiny
from reference.variants import slow
from reference.workers import Workers
from safetensors import safe_open

from agcl.files import shards, tensor_file
from agcl.files.checkpoint import Checkpoint

ROWS = tiny.random_rows(11)
STOP = 3
FILES = ["file", "file-0-0", "file-0-1"]


def assert_same(found, expected, tolerance=0.0):
    assert found.losses == pytest.approx(expected.losses, rel=tolerance, abs=0)
    for name, weight in expected.weights.items():
        torch.testing.assert_close(
            found.weights[name], weight, rtol=tolerance, atol=tolerance, msg=name
        )


@pytest.fixture(scope="module")
def uninterrupted(workers, tmp_path_factory):
    return workers.run(sharded.with_checkpoint, ROWS, tmp_path_factory.mktemp("whole"))[0]


@pytest.fixture(scope="module")
def stopped(workers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped")
    workers.run(sharded.with_checkpoint, ROWS, folder, STOP)
    return folder


@pytest.fixture
def folder(stopped, tmp_path):
    """Holds what two ranks wrote until they were stopped."""
    return shutil.copytree(stopped, tmp_path / "folder")


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def tensors(file):
    with safe_open(file, framework="pt") as stored:
        return {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118


def test_every_rank_writes_its_rows_and_nobody_the_whole_model(folder):
    assert names(folder) == FILES
    file, *parts = (tensors(folder / name) for name in FILES)
    assert {key.partition("/")[0] for key in file} == {"step", "steps"}
    model = sharded.model_of("LlamaForCausalLM")
    for name, weight in model.named_parameters():
        for entry in ("weight", "exp_avg", "exp_avg_sq"):
            held = [part[f"{entry}/{name}"] for part in parts]
            assert [len(rows) for rows in held] == [(len(weight) + 1) // 2, len(weight) // 2]
            assert torch.cat(held).shape == weight.shape


def test_two_ranks_resume_bit_for_bit(workers, folder, uninterrupted):
    for found in workers.run(sharded.with_checkpoint, ROWS, folder):
        assert found.steps == STOP
        assert_same(found, uninterrupted)


def test_one_rank_resumes_what_two_wrote_and_two_what_one_wrote(
    workers, folder, uninterrupted, tmp_path
):
    found = sharded.with_checkpoint(ROWS, folder, STOP + 1)
    assert (found.steps, names(folder)) == (STOP, ["file"])
    for again in workers.run(sharded.with_checkpoint, ROWS, folder, remove=True):
        assert again.steps == STOP + 1
        assert_same(again, uninterrupted, 1e-4)
    assert names(folder) == []


@pytest.mark.parametrize("ranks", [1, *slow(2)])
@pytest.mark.parametrize("damage", ["missing", "cut", "flipped", "other", "swapped", "uncommitted"])
def test_partial_and_damaged_checkpoints_are_ignored(
    workers, folder, uninterrupted, tmp_path, damage, ranks
):
    part = folder / FILES[2]
    content = bytearray(part.read_bytes())
    match damage:
        case "missing":
            part.unlink()
        case "cut":
            part.write_bytes(content[:-7])
        case "flipped":
            content[-7] ^= 1
            part.write_bytes(content)
        case "other":  # The same part as another write left it.
            workers.run(sharded.with_checkpoint, ROWS, tmp_path / "other", STOP)
            shutil.copy(tmp_path / "other" / part.name, part)
        case "swapped":
            shutil.copy(folder / FILES[1], part)
        case "uncommitted":
            (folder / "file").unlink()
    run = sharded.with_checkpoint
    found = run(ROWS, folder) if ranks == 1 else workers.run(run, ROWS, folder)[1]
    assert found.steps == 0
    assert_same(found, uninterrupted, 1e-4 if ranks == 1 else 0.0)


@pytest.mark.parametrize("where", ["-0", *slow("-1", "file")])
def test_a_failed_write_keeps_the_last_checkpoint(workers, folder, uninterrupted, where):
    before = {name: (folder / name).read_bytes() for name in FILES}
    found = workers.run(sharded.with_checkpoint, ROWS, folder, fails={where: "Input/output error"})
    said = [each for rank in found for each in rank.warnings]
    assert set(said) == {"cannot write a checkpoint (Input/output error); the last one is kept"}
    assert {name: (folder / name).read_bytes() for name in names(folder)} == before
    assert_same(found[0], uninterrupted)
    assert workers.run(sharded.with_checkpoint, ROWS, folder)[0].steps == STOP


def test_a_full_disk_on_one_rank_deletes_the_checkpoint_of_all(workers, folder, uninterrupted):
    full = {"-1": "No space left on device"}
    first, second = workers.run(sharded.with_checkpoint, ROWS, folder, fails=full)
    assert first.warnings[0] == "no space left for a checkpoint; the last one was deleted"
    assert second.warnings == []
    assert names(folder) == []
    assert_same(first, uninterrupted)


@pytest.mark.parametrize("lost", ["second", *slow("both", "stale")])
def test_lost_machines_are_replaced_from_the_copies(workers, uninterrupted, tmp_path, lost):
    """Every rank has a disk of its own, as with a bucket."""
    disks, bucket = tmp_path / "disks", tmp_path / "bucket"
    disks.mkdir()
    bucket.mkdir()
    where = {"elsewhere": bucket, "apart": True}
    if lost == "stale":  # Its first rank was another machine for a while.
        workers.run(sharded.with_checkpoint, ROWS, disks, 1, **where)
        shutil.copytree(disks, tmp_path / "old")
    workers.run(sharded.with_checkpoint, ROWS, disks, STOP, **where)
    assert names(bucket) == FILES
    assert [names(disks / rank) for rank in "01"] == [FILES[:2], FILES[2:]]
    for rank in {"both": "01", "second": "1", "stale": "01"}[lost]:
        shutil.rmtree(disks / rank)
    if lost == "stale":
        shutil.copytree(tmp_path / "old", disks, dirs_exist_ok=True)
        (disks / "1" / "file-0-1").unlink()
        workers.run(sharded.with_checkpoint, ROWS, tmp_path / "unused", 1)
        shutil.copy(tmp_path / "unused" / "file-0-1", disks / "1")
    found = workers.run(sharded.with_checkpoint, ROWS, disks, remove=True, **where)
    assert [each.steps for each in found] == [STOP, STOP]
    assert_same(found[0], uninterrupted)
    assert names(bucket) == names(disks / "0") == names(disks / "1") == []


def test_parts_that_do_not_arrive_elsewhere_are_not_committed(workers, folder, tmp_path):
    (tmp_path / "bucket").touch()  # Not a folder, so every copy fails.
    found = workers.run(
        sharded.with_checkpoint, ROWS, folder, STOP + 1, elsewhere=tmp_path / "bucket"
    )
    assert [each.steps for each in found] == [STOP, STOP]
    assert all("the checkpoint's copy" in each.warnings[0] for each in found)
    assert names(folder) == FILES


@pytest.mark.slow  # It needs processes of its own, whose collectives have a short timeout.
@pytest.mark.parametrize("whole", [True, False])
def test_ranks_wait_for_copies_longer_than_collectives_may_take(tmp_path, whole):
    own = Workers(tmp_path)
    disks, bucket = tmp_path / "disks", tmp_path / "bucket"
    disks.mkdir()
    bucket.mkdir()
    slowly = {"elsewhere": bucket, "apart": True, "whole": whole, "seconds": 2, "timeout": 1}
    try:
        own.run(sharded.with_checkpoint, ROWS, disks, 2, **slowly)
        shutil.rmtree(disks / "0")
        found = own.run(sharded.with_checkpoint, ROWS, disks, STOP, **slowly)
    finally:
        own.close()
    assert [each.steps for each in found] == [2, 2]


@pytest.mark.parametrize(
    "header",
    [{"parts": n} for n in (-1, 10**9, "2", 2.0, True, None)] + [{"slot": "/../x", "parts": 1}],
)
def test_a_header_with_an_impossible_number_of_parts_is_ignored(tmp_path, header):
    model = tiny.llama()
    optimizer = torch.optim.AdamW(model.parameters())
    named = dict(model.named_parameters())
    tensors = {f"weight/{name}": torch.zeros_like(p) for name, p in named.items()}
    tensors["steps"] = torch.tensor(list(b'[[{"loss": 1.0}, 1]]'), dtype=torch.uint8)
    for more, steps in (({}, 1), (header, 0)):
        file = tmp_path / f"file{steps}"
        tensor_file.write(file, tensors, "checkpoint", {"identity": "a task", **more})
        assert len(Checkpoint(file, "a task", 0.0).restore(named, optimizer)) == steps


def test_parts_whose_rows_overlap_or_leave_a_gap_are_not_whole():
    shapes = {"weight/a": torch.Size((4, 2))}

    def of(*rows):
        parts = [{"weight/a": shards.RowRange(f, (n, 2), torch.float32)} for f, n in rows]
        return shards.are_whole(parts, shapes)

    assert of((0, 4))
    assert of((2, 2), (0, 2))
    for rows in [((0, 3),), ((0, 2), (3, 1)), ((0, 3), (2, 2)), ((-1, 5),), ((0, 5),), ()]:
        assert not of(*rows)


def test_a_file_that_does_not_arrive_elsewhere_leaves_the_last_copy_complete(workers, tmp_path):
    disks, bucket = tmp_path / "disks", tmp_path / "bucket"
    disks.mkdir()
    bucket.mkdir()
    where = {"elsewhere": bucket, "apart": True}
    workers.run(sharded.with_checkpoint, ROWS, disks, STOP, **where)
    found = workers.run(sharded.with_checkpoint, ROWS, disks, STOP + 1, refused=FILES[0], **where)
    assert "the checkpoint's copy: no copy of file" in found[0].warnings
    assert sum(len(names(disks / rank)) for rank in "01") == len(FILES)
    shutil.copytree(bucket, tmp_path / "copy")
    assert workers.run(sharded.with_checkpoint, ROWS, disks, STOP + 2, **where)[0].steps == STOP + 1
    shutil.rmtree(disks)
    shutil.rmtree(bucket)
    disks.mkdir()
    shutil.copytree(tmp_path / "copy", bucket)
    found = workers.run(sharded.with_checkpoint, ROWS, disks, remove=True, **where)
    assert [each.steps for each in found] == [STOP, STOP]
    assert names(bucket) == []
