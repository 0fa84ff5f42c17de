"""Baselines that change the loss, or the weights after a task, through their stages."""

import json
from pathlib import Path

import pytest
import torch
from reference import tiny
from reference.variants import slow

from agcl.errors import InputError
from agcl.loss import Loss
from agcl.model import models
from pipeline.stages import loss as loss_module
from pipeline.stages.context import Context
from pipeline.stages.files import LOG_FILE

FIRST, SECOND = "train/1-harbour", "train/2-valley"


def weights(stage):
    return dict(models.load_model(stage.folder).named_parameters())


def distance(one, other):
    return sum(float((one[name] - other[name]).detach().square().sum()) for name in one) ** 0.5


def losses(stage):
    lines = (stage.folder / LOG_FILE).read_text(encoding="utf-8").splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


ONE_EPOCH = "training.epochs=1"
"""Enough where the first steps tell."""


@pytest.mark.parametrize("method", ["kl", *slow("kl_reverse", "lwf")])
def test_without_strength_an_anchor_is_plain_fine_tuning(run, method):
    plain = run(ONE_EPOCH, method="sequential")
    anchored = run(ONE_EPOCH, "loss.strength=0", method=method)
    for stage in (FIRST, SECOND):
        assert anchored[stage].fingerprint == plain[stage].fingerprint


@pytest.mark.slow
@pytest.mark.parametrize("method", ["kl", pytest.param("kl_reverse", marks=pytest.mark.slow)])
def test_an_anchor_keeps_the_model_closer_to_the_base_the_stronger_it_is(run, method):
    base = weights(run(method="sequential")["pretrain"])
    found = [run(f"loss.strength={s}", method=method) for s in (0, 1, 30)]
    moved = [distance(weights(resolved[SECOND]), base) for resolved in found]
    assert moved[0] > moved[1] > moved[2]


def test_lwf_is_anchored_to_the_last_tasks_model_and_kl_to_the_base(run):
    of_base, of_last = (run("loss.strength=30", method=method) for method in ("kl", "lwf"))
    assert of_base[FIRST].fingerprint == of_last[FIRST].fingerprint
    start, base = weights(of_base[FIRST]), weights(of_base["pretrain"])
    for resolved in (of_base, of_last):
        resolved["moved"] = distance(weights(resolved[SECOND]), start)
        resolved["from base"] = distance(weights(resolved[SECOND]), base)
    assert of_last["moved"] != of_base["moved"]
    assert of_last["from base"] > of_base["from base"]
    # The first step's model is the reference of lwf.
    assert losses(of_last[SECOND])[0] < losses(of_base[SECOND])[0]


@pytest.mark.slow
def test_asft_and_stm_change_what_is_learned(run):
    plain = losses(run(ONE_EPOCH, method="sequential")[FIRST])[0]
    weighted = losses(run(ONE_EPOCH, "loss.strength=0", method="asft")[FIRST])[0]
    masked = losses(run(ONE_EPOCH, method="stm")[FIRST])[0]
    everything = losses(run(ONE_EPOCH, "loss.max_perplexity=1e9", method="stm")[FIRST])[0]
    assert everything == pytest.approx(plain, rel=1e-5)
    assert 0 < weighted < plain
    assert 0 <= masked < plain


@pytest.mark.slow
def test_an_adapters_base_model_is_not_loaded_again(run, monkeypatch):
    loaded = []
    original = loss_module.frozen

    def watched(reference) -> Loss:
        loaded.append(reference)
        return original(reference)

    monkeypatch.setattr(loss_module, "frozen", watched)
    run(ONE_EPOCH, "loss.reference=base", "loss.strength=2", method="lora")
    assert not loaded
    run(ONE_EPOCH, "loss.reference=previous", "loss.strength=2", method="lora")
    # For the second task; before the first, the previous model is the base.
    assert len(loaded) == 1
    assert loaded[0].dtype == torch.float32


@pytest.mark.parametrize(("device", "dtype"), [("cpu", "float32"), ("cuda", "bfloat16")])
def test_a_reference_is_held_in_bfloat16_on_a_gpu_alone(device, dtype, monkeypatch):
    """Many CPUs have no bfloat16 instructions: there its passes took 60 times as long."""
    context, read = Context(device=torch.device(device)), []
    monkeypatch.setattr(context, "loaded", lambda _, config: read.append(config) or tiny.llama())
    inputs = {"reference": Path("base"), "model": Path("last")}
    config = {"adapter": None, "loss": {"strength": 1.0}, "loading": {"dtype": "float32"}}
    loss_module.loss_of(config, inputs, context)
    assert read == [{"loading": {"dtype": dtype}}]


def test_a_merged_model_lies_between_and_the_next_task_starts_there(run):
    resolved = run("merge.factor=0.25", method="merge")
    base, trained, merged = map(
        weights, (resolved["pretrain"], resolved[FIRST], resolved["merge/1-harbour"])
    )
    for name, weight in merged.items():
        expected = 0.75 * base[name] + 0.25 * trained[name]
        torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-6)
    assert resolved[SECOND].inputs["model"] == resolved["merge/1-harbour"].folder
    last = resolved["merge/2-valley"]
    assert last.inputs == {
        "model": resolved[SECOND].folder,
        "onto": resolved["merge/1-harbour"].folder,
    }
    assert resolved["evaluate/2-valley"].inputs["model"] == last.folder


def test_of_task_t_a_share_of_one_over_the_root_of_t_is_kept(run):
    resolved = run(method="merge_sqrt")
    before, trained, merged = map(
        weights, (resolved["merge/1-harbour"], resolved[SECOND], resolved["merge/2-valley"])
    )
    whole, kept = distance(trained, before), distance(merged, before)
    assert kept == pytest.approx(whole / 2**0.5, rel=1e-4)
    assert distance(weights(resolved[FIRST]), before) == 0


def test_wise_trains_as_plain_fine_tuning_does_and_scores_what_lies_between(run):
    plain, resolved = run(method="sequential"), run(method="wise")
    for stage in (FIRST, SECOND):
        assert resolved[stage].fingerprint == plain[stage].fingerprint
    base, trained, merged = map(
        weights, (resolved["pretrain"], resolved[SECOND], resolved["merge/2-valley"])
    )
    whole, kept = distance(trained, base), distance(merged, base)
    assert kept == pytest.approx(whole / 2, rel=1e-4)
    assert resolved["evaluate/1-harbour"].inputs["model"] == resolved["merge/1-harbour"].folder


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["loss.max_perplexity=2"], "loss.max_perplexity: needs a reference model"),
        (["loss.reference=base", "adapter.merge=false", "method=lora"], None),
        (
            ["loss.reference=previous", "adapter.merge=false", "method=lora"],
            "loss.reference: the previous task's model needs adapter.merge",
        ),
        (["merge.factor=0.5", "method=lora"], "merge: with an adapter needs adapter.fresh"),
        (["merge.factor=2"], "merge.factor"),
        (["method=joint", "loss.reference=base"], "method: joint protects nothing"),
        (["method=solo", "merge.factor=0.5"], "method: solo protects nothing"),
    ],
)
def test_what_cannot_be_combined_is_refused_by_name(tiny_config, tmp_path, overrides, said):
    overrides = dict(each.split("=", 1) for each in overrides)
    method = overrides.pop("method", "agcl")
    given = [f"{key}={value}" for key, value in overrides.items()]
    if said is None:
        tiny_config(tmp_path, *given, method=method)
        return
    with pytest.raises(InputError) as error:
        tiny_config(tmp_path, *given, method=method)
    assert said in str(error.value)


@pytest.mark.slow
def test_adam_in_8_bits_learns_in_runs_of_its_own(run):
    resolved = run("training.optimizer=adamw_8bit", "training.epochs=6")
    assert resolved["pretrain"].fingerprint == run(ONE_EPOCH)["pretrain"].fingerprint
    assert losses(resolved[FIRST])[-1] < 0.5 * losses(resolved[FIRST])[0]


@pytest.mark.slow
def test_sgd_learns_and_a_gate_on_its_gradient_is_one_on_its_update(run):
    options = ["training.optimizer=sgd", "training.learning_rate=0.3", "training.epochs=6"]
    plain = run(*options, method="sequential")
    assert losses(plain[FIRST])[-1] < 0.7 * losses(plain[FIRST])[0]
    on = {
        where: run(*options, f"protect.0.on={where}", method="gate")
        for where in ("update", "gradient")
    }
    first, second = (weights(resolved[SECOND]) for resolved in on.values())
    # Up to the weight decay of gradients: the gate stays the same throughout the task.
    assert distance(first, second) < 0.01 * distance(first, weights(plain[SECOND]))
