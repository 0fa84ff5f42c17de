"""What `agcl plan` foretells, against what a finished run took."""

import pytest

from pipeline.estimate import ProbeFailed, estimate
from pipeline.run import open_run
from pipeline.stages.files import IMPORTANCE_FILE

pytestmark = pytest.mark.ray


def test_disk_and_kinds_are_those_of_the_finished_run(finished, tiny_config, tmp_path):
    run = open_run(tiny_config(tmp_path / "storage", method="sequential"))
    needs = estimate(run)
    folders = {work.folder for work in finished.runs["sequential"].resolved.values()}
    there = sum(f.stat().st_size for folder in folders for f in folder.rglob("*") if f.is_file())
    assert needs.disk_bytes == pytest.approx(there, rel=0.3)
    assert set(needs.seconds) == {"pretrain", "train", "evaluate", "start"}
    assert all(seconds > 0 for seconds in needs.seconds.values())
    assert 2e8 < needs.worker_bytes < 4e9
    assert not (tmp_path / "storage").exists()


def test_what_is_done_needs_nothing_more(finished):
    needs = estimate(finished.runs["gradient"])
    assert needs.disk_bytes == 0
    assert needs.seconds == {}


def test_a_run_that_protects_from_its_first_task_on_is_foretold_too(
    finished, tiny_config, tmp_path
):
    """It has no plain training to tell from."""
    works = finished.runs["gradient"].resolved
    settings = [
        f"model.path={works['pretrain'].folder}",
        f"importance.past=[{works['attribute/1-harbour'].folder / IMPORTANCE_FILE}]",
    ]
    run = open_run(tiny_config(tmp_path / "storage", *settings, method="gate"))
    assert set(estimate(run).seconds) == {"train", "attribute", "evaluate", "start"}


def test_a_stage_that_fails_is_named_with_its_error(tiny_config, tmp_path):
    run = open_run(tiny_config(tmp_path / "storage", "training.learning_rate=1e30"))
    with pytest.raises(ProbeFailed, match=r"train/1-harbour: NonFiniteLoss: loss"):
        estimate(run)
