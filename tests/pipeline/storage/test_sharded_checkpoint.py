"""The checkpoint of a sharded model in a bucket: a part per rank, resumed on other machines."""

import shutil

import pytest
from reference import sharded, tiny

ROWS = tiny.random_rows(11)
NAMES = ["train.checkpoint", "train.checkpoint-0-0", "train.checkpoint-0-1"]


def test_another_number_of_machines_resumes_from_the_bucket(workers, tmp_path, monkeypatch):
    monkeypatch.setenv("AGCL_CACHE", "")  # Set by what runs in this process.
    bucket = tmp_path / "bucket"
    bucket.mkdir()
    uri = f"file://{bucket}"

    def stored():
        return sorted(file.name for file in (bucket / "stages").iterdir())

    def run(*args, **options):
        disks = tmp_path / "disks"
        disks.mkdir(exist_ok=True)
        run = sharded.with_checkpoint
        return workers.run(run, ROWS, disks, *args, apart=True, bucket=uri, **options)

    expected = sharded.with_checkpoint(ROWS, tmp_path / "none", 5)
    run(3)
    assert stored() == NAMES
    written = shutil.copytree(bucket, tmp_path / "copy")
    shutil.rmtree(tmp_path / "disks")
    for found in run(remove=True):
        assert found.steps == 3
        assert found.warnings == []
        assert found.losses[:5] == pytest.approx(expected.losses, rel=1e-4)
    assert stored() == []
    assert not [*(tmp_path / "disks").rglob("*.checkpoint*")]
    shutil.copytree(written, bucket, dirs_exist_ok=True)
    alone = sharded.with_checkpoint(ROWS, tmp_path / "alone", 4, bucket=uri)
    assert (alone.steps, stored()) == (3, NAMES[:1])
