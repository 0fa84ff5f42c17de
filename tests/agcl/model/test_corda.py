"""CorDA's start for LoRA, against PEFT's own and against its formula in float64."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from reference import families, tiny
from safetensors.torch import load_file

from agcl.errors import InputError
from agcl.lrp import attributed_linears, weight_of
from agcl.model import adapter, corda
from agcl.train import train_task

IDS = torch.arange(2, 10).unsqueeze(0)
TEXTS = [row.input_ids for row in tiny.random_rows(20, seed=7)]
SIZE = {"rank": 3, "alpha": 6.0}


@torch.no_grad()
def logits(model):
    return model(IDS, use_cache=False).logits


def started(model, folder):
    """A folder as training starts from it."""
    factors = corda.decompose(model, TEXTS, **SIZE)
    corda.write(adapter.lora_config(model, **SIZE), factors, factors, folder, "base")
    return folder


def of_peft(model):
    """The model as PEFT itself starts it."""
    config = adapter.lora_config(model, **SIZE)
    config.init_lora_weights = "corda"
    config.corda_config = CordaConfig(corda_method="kpm")

    def read():
        for ids in TEXTS:
            model(torch.tensor([ids]))

    preprocess_corda(model, config, run_model=read)
    return get_peft_model(model, config)


def state(peft_model):
    return {n: p.detach().clone() for n, p in peft_model.named_parameters()}


def fitted(peft_model):
    train_task(
        peft_model.get_base_model(),
        tiny.random_rows(8),
        torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=1e-2),
        epochs=5,
        batch_size=4,
        micro_batch_size=4,
        seed=0,
    )
    return peft_model.eval()


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "GPT2LMHeadModel", "Phi3ForCausalLM"])
def test_training_starts_from_what_peft_itself_starts_from(tmp_path, architecture):
    def model():
        return families.model(architecture, dtype=torch.float32)

    base = model()
    folder = started(base, tmp_path)
    assert all(torch.equal(p, base.get_parameter(n)) for n, p in model().named_parameters())
    assert not any(hasattr(linear, "eigens") for linear in attributed_linears(base).values())
    ours, _ = corda.attach(base, **SIZE, start=folder)
    theirs = state(of_peft(model()))
    for name, found in state(ours).items():
        assert torch.equal(found, theirs[name]), name
    torch.testing.assert_close(logits(ours), logits(model()), rtol=1e-3, atol=1e-3)
    merged = adapter.merged(ours)
    for name, weight in model().named_parameters():
        torch.testing.assert_close(merged.get_parameter(name), weight, rtol=1e-4, atol=1e-4)


def test_the_factors_are_the_directions_that_the_texts_use_least():
    model, inputs = tiny.llama(), {}
    linears = attributed_linears(model)
    factors = corda.decompose(model, TEXTS, **SIZE)
    handles = [
        linear.register_forward_hook(
            lambda module, args, out, n=name: inputs.setdefault(n, []).append(args[0][0].double())
        )
        for name, linear in linears.items()
    ]
    with torch.no_grad():
        for ids in TEXTS:
            model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    for name, linear in linears.items():
        weight = weight_of(linear).detach().double()
        moment = sum(x.T @ x / x.max() ** 2 for x in inputs[name]) / len(TEXTS)
        moment += 0.01 * moment.diagonal().mean() * torch.eye(len(moment))
        u, s, v = torch.linalg.svd(weight @ moment, full_matrices=False)
        expected = (u[:, -3:] * s[-3:]) @ v[-3:] @ torch.linalg.inv(moment)
        layer = "base_model.model." + name.removesuffix("weight")
        a, b = (factors[f"{layer}lora_{factor}.weight"].double() for factor in "AB")
        assert expected.norm() > 1e-3
        error = (2.0 * b @ a - expected).norm() / expected.norm()
        assert error < 0.02, name  # PEFT inverts in float32.
        x = torch.cat(inputs[name])
        share = (x @ expected.T).norm() / (x @ weight.T).norm()
        others = torch.linalg.svd(weight, full_matrices=False)
        leading = (others[0][:, :3] * others[1][:3]) @ others[2][:3]
        assert share < 0.7 * (x @ leading.T).norm() / (x @ weight.T).norm(), name


def test_a_saved_adapter_is_an_ordinary_one_on_the_base_as_it_was(tmp_path):
    peft_model, initial = corda.attach(tiny.llama(), **SIZE, start=started(tiny.llama(), tmp_path))
    fitted(peft_model)
    changed = logits(peft_model)
    assert (changed - logits(tiny.llama())).abs().max() > 0.1
    corda.save(peft_model, initial, tmp_path / "saved", "a base", "abc")
    settings = json.loads((tmp_path / "saved" / adapter.CONFIG).read_text())
    assert (settings["r"], settings["lora_alpha"]) == (6, 12.0)
    assert settings["init_lora_weights"] is True
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("a base", "abc")
    plain = PeftModel.from_pretrained(tiny.llama(), tmp_path / "saved")
    torch.testing.assert_close(logits(plain), changed, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(logits(adapter.merged(peft_model)), changed, rtol=1e-3, atol=1e-3)


def test_the_saved_adapter_is_peft_s_own_conversion(tmp_path):
    """PEFT keeps the factors of the start in a folder, and subtracts them when it saves."""
    theirs = of_peft(tiny.llama())
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = "corda"
    fitted(theirs).save_pretrained(
        tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    folder = started(tiny.llama(), tmp_path / "from")
    ours, initial = corda.attach(tiny.llama(), **SIZE, start=folder)
    corda.save(fitted(ours), initial, tmp_path / "ours", "base")
    one, other = (load_file(tmp_path / name / adapter.WEIGHTS) for name in ("ours", "theirs"))
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert torch.equal(tensor, other[key]), key


def test_training_goes_on_from_a_saved_adapter(tmp_path):
    peft_model, initial = corda.attach(tiny.llama(), **SIZE, start=started(tiny.llama(), tmp_path))
    fitted(peft_model)
    corda.save(peft_model, initial, tmp_path / "saved", "base")
    again, same = corda.attach(tiny.llama(), **SIZE, start=tmp_path / "saved")
    one, other = state(peft_model), state(again)
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert all(torch.equal(tensor, same[key]) for key, tensor in initial.items())
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n in other if "lora_" in n
    }


def test_what_corda_cannot_start_from_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"adapter\.rank: 9 is more than 8, the singular"):
        corda.decompose(tiny.llama(), TEXTS, rank=9, alpha=1.0)
    with pytest.raises(InputError, match=r"adapter\.init: corda needs weights in float32"):
        corda.decompose(tiny.llama(dtype=torch.bfloat16), TEXTS, **SIZE)
    adapter.save(adapter.attach(tiny.llama(), **SIZE, seed=0), tmp_path, "base")
    with pytest.raises(InputError, match="rank 3, not 6"):
        corda.attach(tiny.llama(), **SIZE, start=tmp_path)
