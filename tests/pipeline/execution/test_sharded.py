"""Every stage on a model that two workers share."""

import json

import pytest
from reference import sharded

ALL = "protect=[{kind: gate, strength: 0.5}, {kind: penalty}, {kind: project, energy: 0.6}]"


def test_a_run_whose_workers_share_the_model_gives_the_same_numbers(
    tiny_config, run_in_process, copy_stages, workers, tmp_path
):
    few = ["training.epochs=4", "model.pretraining.epochs=2", "importance.correct_only=false"]
    settings = [ALL, "importance.split=samples", *few]
    alone = run_in_process(tiny_config(tmp_path / "alone", *settings))
    copy_stages(tmp_path / "alone", tmp_path / "shared", ("tokenizer", "prepare"))
    config = tiny_config(tmp_path / "shared", *settings)
    workers.run(sharded.stages_of, config)
    shared = run_in_process(config)  # The report.
    assert shared.keys() == alone.keys()
    for name, work in shared.items():
        assert work.is_complete()
        assert work.fingerprint == alone[name].fingerprint
    one, two = (
        json.loads((w["report"].folder / "metrics.json").read_text()) for w in (alone, shared)
    )
    kl = [each["base"].pop("kl_answers") for each in (one, two)]
    assert kl[1] == pytest.approx(kl[0], rel=1e-3)
    assert two == one
    for stage in ("pretrain", "train/1-harbour", "train/2-valley"):
        one, two = (
            [json.loads(line)["loss"] for line in (w[stage].folder / "log.jsonl").open()]
            for w in (alone, shared)
        )
        assert two == pytest.approx(one, rel=1e-4)
    assert (shared["train/2-valley"].folder / "checks.json").exists()
    assert not list((tmp_path / "shared").rglob("*.checkpoint*"))
