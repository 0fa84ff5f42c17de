"""What `agcl plan` predicts, against what a run took."""

import json
import os
import tempfile
from dataclasses import replace

import pytest

from pipeline.config import loading
from pipeline.estimate import rehearsal
from pipeline.estimate.rehearsal import RehearsalFailed, estimate
from pipeline.plan.plan import plan
from pipeline.run import open_run
from pipeline.stages.files import IMPORTANCE_FILE

pytestmark = pytest.mark.timeout(300)
TIMED = {"pretrain", "train", "attribute", "evaluate"}
GATE, FEW = "protect.0.kind=gate", "training.epochs=6"


@pytest.fixture(scope="module")
def finished_run(tiny_config, tmp_path_factory):
    """A config's run whose stages are all there."""
    run = open_run(tiny_config(tmp_path_factory.mktemp("finished_run"), GATE, FEW))
    rehearsal._run(list(run.resolved.values()), "cpu", 1)
    return run


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """The folder of temporary files, which must be empty afterwards."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert not list(folder.iterdir())


@pytest.mark.slow  # It compares times, which a busy machine changes.
def test_the_estimate_is_close_to_what_the_run_took(tiny_config, tmp_path):
    run = open_run(tiny_config(tmp_path / "run", GATE, FEW))
    peak = rehearsal._peak_of(list(run.resolved.values()), "cpu", 1)
    needs = estimate(open_run(tiny_config(tmp_path / "storage", GATE, FEW)))
    assert needs.worker_bytes == pytest.approx(peak, rel=0.15)
    stages = run.resolved.values()
    files = [f for stage in stages for f in stage.folder.rglob("*") if f.is_file()]
    assert needs.disk_bytes == pytest.approx(sum(f.stat().st_size for f in files), rel=0.05)
    assert needs.seconds.keys() == TIMED | {"start", "own_text"}
    for kind in TIMED:
        took = sum(stage.manifest()["seconds"] for stage in stages if stage.fn.__name__ == kind)
        assert took / 5 < needs.seconds[kind] < took * 5, kind
    assert not (tmp_path / "storage").exists()


def test_a_finished_run_needs_nothing(finished_run):
    needs = estimate(finished_run)
    assert needs.disk_bytes == 0
    assert set(needs.seconds.values()) == {0.0}


def test_more_epochs_and_rows_take_longer_in_proportion(tiny_config, tmp_path, monkeypatch):
    """The rehearsal's own measurements are replaced, so that only the scaling is left."""
    monkeypatch.setattr(rehearsal, "_peak_of", lambda *given: 1)
    monkeypatch.setattr(rehearsal, "_add", lambda needs, stage, ratio, *given: _note(stage, ratio))
    ratios = {}

    def _note(stage, ratio):
        ratios[stage.name] = ratio

    config = tiny_config(tmp_path, GATE, "tasks.entities=100", "importance.samples=50")
    assert config.training.epochs == 12
    estimate(open_run(config))
    # 400 rows per task, 64 of the base model; the rehearsal takes at most 3 batches of 32 of each.
    assert ratios["prepare/valley"] == pytest.approx(800 / 192)
    assert ratios["pretrain"] == config.model.pretraining.epochs
    assert ratios["train/2-valley"] == pytest.approx(12 * 400 / 96)
    assert ratios["attribute/2-valley"] == 1.0  # 50 samples in both.
    assert ratios["evaluate/2-valley"] == pytest.approx((4 * 400 + 64) / (4 * 96 + 64))


def test_a_rehearsal_for_several_workers_needs_one_gpu(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr(rehearsal, "_peak_of", lambda *given: 1)
    monkeypatch.setattr(rehearsal, "_add", lambda *given: None)
    settings = ["resources.gpus_per_worker=1", "resources.num_workers=8"]
    run = open_run(tiny_config(tmp_path, *settings), devices=False)
    assert estimate(run, "cuda").worker_bytes == 1


@pytest.mark.parametrize(("passes", "num_workers", "shared"), [(1, 4, 1), (4, 4, 4), (6, 4, 3)])
def test_a_batch_is_shared_by_as_many_workers_as_it_has_passes(
    finished_run, monkeypatch, passes, num_workers, shared
):
    run = finished_run
    example = run.resolved["train/2-valley"]
    stage = next(each for each in run.plan.stages if each.name == example.name)
    resources = run.config.resources.model_copy(update={"num_workers": num_workers})
    monkeypatch.setattr(rehearsal, "passes_per_batch", lambda config, rows: passes)

    def needs(ratio, resources):
        found = rehearsal.Needs(0)
        rehearsal._add(found, stage, ratio, example, resources)
        return found

    def of_rows(resources):
        return needs(2.0, resources).seconds["train"] - needs(1.0, resources).seconds["train"]

    assert of_rows(run.config.resources) / of_rows(resources) == pytest.approx(shared)
    warned = needs(1.0, resources).warnings
    assert len(warned) == (passes < num_workers)
    assert all("set training.micro_batch_size=2" in line for line in warned)


def test_tasks_with_other_scorers_are_rehearsed_as_one(tiny_config, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Who?", "answer": " Ada"}\n' * 4)
    tasks = [f"{{name: {name}, train: {tmp_path / 'rows.jsonl'}}}" for name in "abc"]
    section = f"tasks={{format: jsonl, sequence: [{', '.join(tasks)}]}}"

    def kinds(*settings):
        stages = plan(tiny_config(tmp_path, section, *settings)).stages
        by_kind = {}
        for stage in stages:
            by_kind.setdefault(rehearsal._kind(stage), []).append(stage.name)
        return list(by_kind.values())

    of_base = "base.samples=8", "importance.samples=8"
    assert kinds("tasks.sequence.1.scorer=rouge_l") == kinds()
    assert ["attribute/0-base"] in kinds("tasks.scorer=rouge_l", *of_base)


@pytest.fixture
def rehearsed_here(monkeypatch):
    """Rehearsals run in this process, which saves imports; its peak memory is not theirs."""
    monkeypatch.setattr(rehearsal, "_peak_of", rehearsal._run)


@pytest.mark.slow
def test_a_given_model_that_is_protected_from_the_first_task_on(
    finished_run, rehearsed_here, tiny_config, tmp_path
):
    """The run then contains no stage that trains without protection."""
    stages = finished_run.resolved
    settings = [
        f"model.path={stages['pretrain'].folder}",
        f"importance.past=[{stages['attribute/1-harbour'].folder / IMPORTANCE_FILE}]",
    ]
    run = open_run(tiny_config(tmp_path / "storage", *settings, method="gate"))
    assert estimate(run).seconds.keys() == (TIMED | {"start"}) - {"pretrain"}


def test_a_stage_that_fails_is_named_with_its_error(tiny_config, tmp_path):
    run = open_run(tiny_config(tmp_path / "storage", "training.learning_rate=1e30"))
    with pytest.raises(
        RehearsalFailed, match=r"train/1-harbour: loss .* at step 2 of 2; lower the learning"
    ):
        estimate(run)


def die(config, inputs, out_dir, context):
    os._exit(9)


@pytest.mark.slow
def test_a_process_that_is_killed_is_out_of_memory(finished_run, tmp_path):
    stage = replace(finished_run.resolved["tokenizer"], folder=tmp_path / "artifact", fn=die)
    with pytest.raises(RehearsalFailed, match="killed, most likely out of memory"):
        rehearsal._peak_of([stage], "cpu", 1)


def test_merging_which_reads_no_rows_can_be_planned(rehearsed_here, tiny_config, tmp_path):
    config = tiny_config(tmp_path, "tasks.count=1", FEW, method="wise")
    needs = estimate(open_run(config))
    assert "merge" in needs.seconds


def test_a_small_share_for_validation_can_be_planned(finished_run, tmp_path):
    rows = [{"prompt": f"Who is {i}?", "answer": " Me"} for i in range(2000)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = {"format": "jsonl", "seed": 1, "sequence": [{"name": "a", "train": str(file)}]}
    config = loading.validate(
        {
            "method": "sequential",
            "model": {"path": str(finished_run.resolved["pretrain"].folder)},
            "evaluation": {"validation": 0.005},
            "tasks": tasks,
        }
    )
    open_run(config)
    open_run(rehearsal._on_few_rows(config, str(tmp_path / "scratch")))
    # With test rows, a share of the training rows is set aside, which takes time of its own.
    (item,) = tasks["sequence"]
    tested = loading.changed(config, {"tasks.sequence": [item | {"test": str(file)}]})
    few = rehearsal._on_few_rows(tested, str(tmp_path / "scratch"))
    assert few.evaluation.validation == 0.005
