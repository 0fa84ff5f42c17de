"""Every stage on a model that two workers share."""

import json

import pytest
import torch
from reference import sharded

from agcl.model import models

ALL = "protect=[{kind: gate, strength: 0.5}, {kind: penalty}, {kind: project, energy: 0.6}]"
FEW = [
    "training.epochs=4",
    "training.micro_batch_size=4",
    "model.pretraining.epochs=2",
    "importance.correct_only=false",
]


@pytest.fixture
def both(tiny_config, run_in_process, copy_stages, workers, tmp_path):
    """The stages of a run with one worker, and of one with two workers that share the model."""

    def run(*settings, method=None):
        settings = [*settings, "importance.split=samples", *FEW]
        alone = run_in_process(tiny_config(tmp_path / "alone", *settings, method=method))
        copy_stages(tmp_path / "alone", tmp_path / "shared", ("tokenizer", "prepare"))
        config = tiny_config(tmp_path / "shared", *settings, method=method)
        workers.run(sharded.stages_of, config)
        shared = run_in_process(config)  # The report.
        assert shared.keys() == alone.keys()
        for name, stage in shared.items():
            assert stage.is_complete()
            assert stage.fingerprint == alone[name].fingerprint
        assert not list((tmp_path / "shared").rglob("*.checkpoint*"))
        return alone, shared

    return run


def check_metrics(alone, shared):
    one, two = (
        json.loads((w["report"].folder / "metrics.json").read_text()) for w in (alone, shared)
    )
    kl = [each["base"].pop("kl_answers") for each in (one, two)]
    assert kl[1] == pytest.approx(kl[0], rel=1e-3)
    assert two == one


def check_losses(alone, shared, stages):
    for stage in stages:
        one, two = (
            [json.loads(line)["loss"] for line in (w[stage].folder / "log.jsonl").open()]
            for w in (alone, shared)
        )
        assert two == pytest.approx(one, rel=1e-4)


@pytest.mark.slow
def test_a_run_whose_workers_share_the_model_gives_the_same_numbers(both):
    alone, shared = both(ALL)
    check_metrics(alone, shared)
    check_losses(alone, shared, ("pretrain", "train/1-harbour", "train/2-valley"))
    assert (shared["train/2-valley"].folder / "checks.json").exists()


@pytest.mark.parametrize(
    ("method", "merge"),
    [
        pytest.param("lora_agcl", True, marks=pytest.mark.slow),
        pytest.param("lora_agcl", False, marks=pytest.mark.slow),
        pytest.param("lora", True, marks=pytest.mark.slow),
        pytest.param("olora", True, marks=pytest.mark.slow),
        pytest.param("inflora", True, marks=pytest.mark.slow),
    ],
)
def test_a_run_with_an_adapter_on_a_shared_model_gives_the_same_numbers(both, method, merge):
    alone, shared = both(f"adapter.merge={str(merge).lower()}", method=method)
    check_metrics(alone, shared)
    check_losses(alone, shared, ("train/1-harbour", "train/2-valley"))
    if merge:
        one, two = (
            models.load_model(resolved["train/2-valley"].folder).state_dict()
            for resolved in (alone, shared)
        )
        for name, weight in one.items():
            torch.testing.assert_close(two[name], weight, rtol=1e-3, atol=1e-3, msg=name)
