"""LoRA in a Trainer: the adapter is silent for the base model's inputs."""

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from reference import tiny
from reference.trainers import ROWS, basis_of, trainer, weights

from agcl.integrations.names import plain
from agcl.integrations.transformers import (
    Protect,
    attribute_dataset,
    freeze_others,
    protect_base,
)
from agcl.lrp import attributed_linears
from agcl.model import adapter
from agcl.modulation import GatedAdamW, bases, lora
from agcl.train import train_task

TARGETS = ["q_proj", "o_proj", "up_proj"]
LAYER = "model.layers.1.mlp.up_proj"


def with_lora(model=None, **changes):
    settings = {"r": 3, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **changes}
    torch.manual_seed(0)
    return get_peft_model(model or tiny.llama(), LoraConfig(**settings))


def inputs_in(basis):
    generator = torch.Generator().manual_seed(5)
    return (basis @ torch.randn(basis.shape[1], 7, generator=generator)).T


@pytest.mark.parametrize("way", ["callback", "optimizer"])
def test_outputs_for_protected_inputs_stay_and_others_change(tmp_path, way):
    base, model = tiny.llama(), with_lora(lora_dropout=0.1)
    basis = basis_of(base)
    options = {"protected": {"basis": basis}}
    if way == "callback":
        options = {"callbacks": [Protect(basis=basis)]}
    trainer(model, tmp_path, **options).train()
    model.eval()
    layers = dict(model.get_base_model().named_modules())
    for name, layer in attributed_linears(base).items():
        name = name.removesuffix(".weight")
        x = inputs_in(basis[f"{name}.weight"])
        torch.testing.assert_close(layers[name](x), layer(x), rtol=0, atol=2e-6)
    other = torch.randn(7, 16)
    changed = layers[LAYER](other) - dict(base.named_modules())[LAYER](other)
    assert changed.abs().max() > 1e-3


@pytest.mark.parametrize("way", ["callback", "optimizer"])
def test_it_equals_agcls_own_training_of_an_adapter(tmp_path, way):
    basis = basis_of(tiny.llama())
    model, other = (adapter.attach(tiny.llama(), rank=3, alpha=6.0, seed=0) for _ in range(2))
    protection = {"basis": basis}
    options = {"protected": protection}
    if way == "callback":
        options = {"callbacks": [Protect(**protection)]}
    trainer(model, tmp_path, **options).train()
    own = other.get_base_model()
    known = lora.keep_away(other, basis)
    factors = [(name, p) for name, p in own.named_parameters() if p.requires_grad]
    train_task(
        own, ROWS, GatedAdamW(factors, lr=1e-2, weight_decay=0.1, basis=known), epochs=2,
        batch_size=8, micro_batch_size=4, seed=0, schedule="linear",
    )  # fmt: skip
    found = weights(model.get_base_model())
    for name, weight in weights(own).items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=2e-5, msg=name)


def test_a_new_adapter_kept_away_still_changes_nothing(tmp_path):
    model, base = with_lora(), tiny.llama()
    ids = torch.arange(2, 9).unsqueeze(0)
    made = trainer(model, tmp_path, callbacks=[Protect(basis=basis_of(base))], learning_rate=0.0)
    made.train()
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, base(ids).logits)


def test_a_run_resumed_or_trained_on_gives_the_same_bits(tmp_path):
    callbacks = [Protect(basis=basis_of(tiny.llama()))]

    def run(**options):
        model = with_lora()
        trainer(model, tmp_path, callbacks=callbacks, save_strategy="steps", save_steps=2).train(
            **options
        )
        return model

    whole = weights(run())
    model = run(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, weight in weights(model).items():
        assert torch.equal(weight, whole[name]), name
    trainer(model, tmp_path, callbacks=callbacks).train()  # Its A is off the basis already.


def refused(model, folder, **options):
    callback = Protect(**(options or {"basis": basis_of(tiny.llama())}))
    with pytest.raises(ValueError) as error:  # noqa: PT011
        trainer(model, folder, callbacks=[callback]).train()
    return str(error.value)


def test_adapters_that_cannot_be_protected_are_refused(tmp_path):
    assert "DoRA" in refused(with_lora(use_dora=True), tmp_path)
    assert "already reads" in refused(with_lora(init_lora_weights=False), tmp_path)
    assert "bfloat16" in refused(with_lora().to(torch.bfloat16), tmp_path)
    ia3 = IA3Config(
        target_modules=["up_proj"], feedforward_modules=["up_proj"], task_type="CAUSAL_LM"
    )
    assert "only LoRA" in refused(get_peft_model(tiny.llama(), ia3), tmp_path)
    gate = {f"{LAYER}.weight": torch.ones(24, 16)}
    assert "a gate cannot hold" in refused(with_lora(), tmp_path, gate=gate)


def test_a_layer_that_is_trained_whole_beside_lora_is_projected(tmp_path):
    model, basis = with_lora(modules_to_save=["down_proj"]), basis_of(tiny.llama())
    before = weights(model)
    trainer(model, tmp_path, callbacks=[Protect(basis=basis)]).train()
    (name,) = [n for n, p in model.named_parameters() if "layers.0.mlp.down_proj.modules_to" in n]
    step, u = weights(model)[name] - before[name], basis["model.layers.0.mlp.down_proj.weight"]
    assert (step @ u).norm() < 1e-4 * step.norm()


def test_freezing_others_keeps_the_factors_trained():
    model = with_lora(modules_to_save=["lm_head"])
    freeze_others(model, basis_of(tiny.llama()))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * len(TARGETS)
    assert all(".lora_" in name for name in trained)


@pytest.mark.parametrize(
    "name",
    [
        f"module._orig_mod.{LAYER}.weight",
        f"_orig_mod.module.{LAYER}.weight",
        f"base_model.model.{LAYER}.base_layer.weight",
        f"base_model.model.{LAYER}.modules_to_save.default.weight",
        "model.layers.1._orig_mod.mlp.up_proj.weight",
    ],
)
def test_names_lose_what_wrappers_add(name):
    assert plain(name) == f"{LAYER}.weight"


def test_an_adapter_that_goes_on_is_not_let_into_what_the_base_knew(tmp_path, tokenizer):
    basis = protect_base(tiny.llama(), tokenizer, samples=6, tokens=5, energy=0.4)
    model, rows = with_lora(), ["w5 w6 w7 w8", "w9 w8 w3"]
    trainer(model, tmp_path, callbacks=[Protect(basis=basis)]).train()
    later = bases([attribute_dataset(model, tokenizer, rows)], energy=0.5, known=basis)
    with pytest.raises(ValueError, match="merge it"):
        trainer(model, tmp_path, callbacks=[Protect(basis=later)]).train()
    merged = model.merge_and_unload()
    later = bases([attribute_dataset(merged, tokenizer, rows)], energy=0.5, known=basis)
    model = with_lora(merged)
    trainer(model, tmp_path, callbacks=[Protect(basis=later)]).train()
    for name, factor in model.named_parameters():
        if "lora_A" in name:
            u = basis[plain(name.replace(".lora_A.default", ""))]
            assert (factor.detach() @ u).norm() < 1e-5 * factor.detach().norm()
