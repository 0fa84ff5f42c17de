"""LoRA and O-LoRA: attaching, merging, saving, resuming, and orthogonality."""

import pytest
import torch
from peft import PeftModel
from reference import families, tiny

from agcl.attribution import attribute
from agcl.errors import InputError
from agcl.lrp import attributed_linears, relevance_backward
from agcl.model import adapter
from agcl.modulation import GatedAdamW, bases, lora
from agcl.tasks.batches import IGNORED, Batch, collate
from agcl.train import train_task

IDS = torch.arange(2, 10).unsqueeze(0)


def attached(seed=0, **settings):
    return adapter.attach(tiny.llama(), rank=3, alpha=6.0, seed=seed, **settings)


def fitted(peft_model, penalise=None):
    train_task(
        peft_model,
        tiny.random_rows(8),
        torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=1e-2),
        epochs=5,
        batch_size=4,
        micro_batch_size=4,
        seed=0,
        penalise=penalise,
    )
    return peft_model.eval()


@torch.no_grad()
def logits(model):
    return model(IDS, use_cache=False).logits


def factors(peft_model):
    return {n: p.detach().clone() for n, p in peft_model.named_parameters() if "lora_" in n}


def test_a_new_adapter_changes_nothing_and_trains_only_factors_of_linear_layers():
    peft_model = attached()
    assert torch.equal(logits(peft_model), logits(tiny.llama()))
    trained = {n for n, p in peft_model.named_parameters() if p.requires_grad}
    linears = {name.removesuffix(".weight") for name in attributed_linears(tiny.llama())}
    assert {n.removeprefix("base_model.model.").partition(".lora_")[0] for n in trained} == linears
    assert len(trained) == 2 * len(linears)


def test_factors_depend_only_on_the_seed_and_do_not_touch_the_global_one():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one = factors(attached())
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    again, other = factors(attached()), factors(attached(seed=1))
    assert all(torch.equal(one[n], again[n]) for n in one)
    assert any(not torch.equal(one[n], other[n]) for n in one)


def test_merged_weights_give_the_adapters_answers_under_the_original_names(tmp_path):
    peft_model = fitted(attached())
    adapted = logits(peft_model)
    before = [(n, p.shape) for n, p in tiny.llama().named_parameters()]
    adapter.save(peft_model, tmp_path / "adapter", tmp_path / "base")
    model = adapter.merged(peft_model)
    torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(adapted, logits(tiny.llama()), atol=1e-2)
    assert [(n, p.shape) for n, p in model.named_parameters()] == before
    assert all(p.requires_grad for p in model.parameters())
    plain = PeftModel.from_pretrained(tiny.llama(), tmp_path / "adapter")
    assert torch.equal(logits(plain), adapted)


def test_removing_the_adapter_restores_the_model():
    peft_model = fitted(attached())
    model = adapter.removed(peft_model)
    assert torch.equal(logits(model), logits(tiny.llama()))
    assert all(p.requires_grad for p in model.parameters())
    assert [n for n, _ in model.named_parameters()] == [
        n for n, _ in tiny.llama().named_parameters()
    ]


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "GPT2LMHeadModel", "Phi3ForCausalLM"])
@pytest.mark.parametrize("rules", ["attnlrp", "cp"])
def test_the_factors_relevance_equals_that_of_their_outputs(architecture, rules):
    model = families.without_biases(families.model(architecture))
    peft_model = adapter.attach(model, rank=3, alpha=6.0, seed=0)
    inner = peft_model.get_base_model()
    linears = attributed_linears(inner)
    generator = torch.Generator().manual_seed(0)
    parameters = dict(inner.named_parameters())
    for name in linears:  # B starts at zero, which would leave A without relevance.
        parameters[name].data = torch.randn(parameters[name].shape, generator=generator).double()
    with torch.no_grad():
        outside = logits(inner)
    with relevance_backward(inner, rules), families.flow(linears) as seen:
        inside = inner(IDS, use_cache=False).logits
        inside[0, -1, 7].backward()
    assert torch.equal(inside, outside)
    assert {n for n, p in inner.named_parameters() if p.requires_grad} == set(linears)
    assert all(".lora_A." in name or ".lora_B." in name for name in linears)
    if rules == "attnlrp":
        assert seen.keys() == linears.keys()
    for name, (x, z, g) in seen.items():
        relevance = parameters[name] * (g.flatten(0, 1).T @ x.flatten(0, 1))
        torch.testing.assert_close(relevance.sum(), (z * g).sum(), msg=name)


def old_and_new_outputs(peft_model, change):
    """The adapter's part of every layer's output for one batch."""
    layers = {n: m for n, m in peft_model.get_base_model().named_modules() if hasattr(m, "lora_A")}
    inputs = {}
    handles = [
        m.register_forward_pre_hook(lambda module, args, n=n: inputs.update({n: args[0]}))
        for n, m in layers.items()
    ]
    logits(peft_model)
    for handle in handles:
        handle.remove()

    def outputs():
        with torch.no_grad():
            return {
                n: m.lora_B["default"](m.lora_A["default"](inputs[n])) for n, m in layers.items()
            }

    before = outputs()
    change()
    return before, outputs()


def test_projection_preserves_the_factors_outputs_for_old_inputs():
    peft_model = fitted(attached())
    inner = peft_model.get_base_model()
    batch = Batch(IDS, torch.full_like(IDS, IGNORED), torch.tensor([IDS.shape[1] + 1]))
    batch.labels[:, 4:] = IDS[:, 4:]
    importance = attribute(inner, [batch], moments="uniform", keep=1, correct_only=False)
    basis = bases([importance], energy=1 - 1e-9)
    # Of B, all directions are protected: more tokens than it has inputs.
    free = [p for n, p in inner.named_parameters() if ".lora_A." in n]
    before = [p.detach().clone() for p in free]

    def train(**options):
        named = {n: p for n, p in inner.named_parameters() if p.requires_grad}
        optimizer = GatedAdamW(named.items(), lr=1e-2, **options)
        options = {"epochs": 5, "batch_size": 4, "micro_batch_size": 4, "seed": 1}
        train_task(inner, tiny.random_rows(8, seed=3), optimizer, **options)
        inner.eval()

    kept, now = old_and_new_outputs(peft_model, lambda: train(basis=basis))
    assert all(not torch.equal(a, b) for a, b in zip(before, free, strict=True))
    for name in kept:
        torch.testing.assert_close(now[name], kept[name], rtol=1e-3, atol=1e-4, msg=name)
    was, unprotected = old_and_new_outputs(peft_model, train)
    assert any(not torch.allclose(unprotected[n], was[n], atol=1e-2) for n in was)


def test_a_new_adapter_kept_away_outputs_zero_for_old_inputs():
    model = tiny.llama()
    batch = Batch(IDS, torch.full_like(IDS, IGNORED), torch.tensor([IDS.shape[1] + 1]))
    batch.labels[:, 4:] = IDS[:, 4:]
    importance = attribute(model, [batch], moments="uniform", keep=1, correct_only=False)
    peft_model = adapter.attach(model, rank=3, alpha=6.0, seed=0)
    inner = peft_model.get_base_model()
    basis = lora.keep_away(peft_model, bases([importance], energy=1 - 1e-9))
    named = {n: p for n, p in inner.named_parameters() if p.requires_grad}
    assert basis.keys() < named.keys()
    optimizer = GatedAdamW(named.items(), lr=1e-2, basis=basis)
    options = {"epochs": 5, "batch_size": 4, "micro_batch_size": 4, "seed": 1}
    old = logits(tiny.llama())
    train_task(inner, tiny.random_rows(8), optimizer, **options)
    inner.eval()
    torch.testing.assert_close(logits(inner), old, rtol=1e-3, atol=1e-3)
    new = torch.arange(20, 28).unsqueeze(0)
    with torch.no_grad():
        changed = inner(new).logits - tiny.llama()(new).logits
    assert changed.abs().max() > 1e-2


def test_training_continues_from_a_saved_adapter(tmp_path):
    peft_model = fitted(attached())
    kept, adapted = factors(peft_model), logits(peft_model)
    adapter.save(peft_model, tmp_path, tmp_path)
    again = attached(start=tmp_path)
    assert torch.equal(logits(again), adapted)
    assert all(torch.equal(kept[n], tensor) for n, tensor in factors(again).items())
    fitted(again)
    assert all(not torch.equal(kept[n], tensor) for n, tensor in factors(again).items())


def test_a_folder_without_a_matching_adapter_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no adapter_config\.json"):
        attached(start=tmp_path)
    adapter.save(attached(), tmp_path, tmp_path)
    with pytest.raises(InputError, match="rank 3, not 2"):
        adapter.attach(tiny.llama(), rank=2, alpha=6.0, seed=0, start=tmp_path)


@pytest.fixture
def earlier(tmp_path):
    for seed in (0, 1):
        adapter.save(attached(seed), tmp_path / str(seed), tmp_path)
    return lora.directions([tmp_path / "0", tmp_path / "1"])


def test_directions_are_the_stacked_factors_a_by_weight(earlier):
    assert earlier.keys() == attributed_linears(tiny.llama()).keys()
    name = "model.layers.1.mlp.down_proj.weight"
    assert earlier[name].shape == (6, 24)
    key = "base_model.model.model.layers.1.mlp.down_proj.lora_A.default.weight"
    assert torch.equal(earlier[name][3:], factors(attached(1))[key])


def test_the_penalty_is_the_sum_of_all_absolute_products(earlier):
    peft_model = attached(2)
    penalty = lora.orthogonality(peft_model, earlier, strength=0.5)
    expected = 0.0
    for name, parameter in peft_model.named_parameters():
        if "lora_A" in name:
            weight = name.removeprefix("base_model.model.").partition(".lora_")[0] + ".weight"
            for old in earlier[weight]:
                for new in parameter:
                    expected += 0.5 * abs(float(old @ new.detach()))
    assert float(penalty()) == pytest.approx(expected, rel=1e-5)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_A" in name:
                weight = name.removeprefix("base_model.model.").partition(".lora_")[0] + ".weight"
                basis = torch.linalg.qr(earlier[weight].T)[0]
                parameter -= parameter @ basis @ basis.T
    assert float(penalty().detach()) < 1e-3


def test_a_large_strength_keeps_new_factors_apart(earlier):
    def overlap(strength):
        peft_model = attached(2)
        penalty = lora.orthogonality(peft_model, earlier, strength=strength)

        def penalise():
            value = penalty()
            value.backward()
            return value

        fitted(peft_model, penalise)
        return float(lora.orthogonality(peft_model, earlier, strength=1.0)().detach())

    assert overlap(1.0) < 0.5 * overlap(0.0)


def test_factors_in_float32_train_on_a_frozen_bfloat16_base_and_are_rounded_once_when_merged():
    base = tiny.llama(dtype=torch.bfloat16)
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    peft_model, losses = adapter.attach(base, rank=3, alpha=6.0, seed=0), []
    factors = [(n, p) for n, p in peft_model.named_parameters() if p.requires_grad]
    assert {p.dtype for _, p in factors} == {torch.float32}
    train_task(
        peft_model,
        tiny.random_rows(8),
        GatedAdamW(factors, lr=1e-2, rounding="stochastic"),
        epochs=20,
        batch_size=8,
        seed=0,
        log=lambda metrics, step: losses.append(metrics["loss"]),
    )
    assert losses[-1] < 0.5 * losses[0]
    trained = dict(factors)
    merged = dict(adapter.merged(peft_model).named_parameters())
    assert {p.dtype for p in merged.values()} == {torch.bfloat16}
    for name, weight in merged.items():
        expected = before[name]
        if name in attributed_linears(base):
            layer = "base_model.model." + name.removesuffix("weight")
            a, b = (trained[f"{layer}lora_{factor}.default.weight"] for factor in "AB")
            expected = (expected.float() + 2.0 * (b @ a)).bfloat16()
        assert torch.equal(weight, expected), name


def test_an_adapter_that_is_not_active_is_not_attributed():
    peft_model = attached()
    model = peft_model.get_base_model()
    names = list(attributed_linears(model))
    peft_model.add_adapter("other", peft_model.peft_config["default"])
    assert list(attributed_linears(model)) == names
    found = attribute(
        model, [collate(tiny.random_rows(2))], moments="uniform", entries=False, correct_only=False
    )
    assert set(found.inputs) == set(names)
    peft_model.set_adapter("other")
    assert not set(attributed_linears(model)) & set(names)


def test_an_adapter_is_read_on_the_cpu_where_there_is_a_gpu(tmp_path, monkeypatch):
    """PEFT's default is the first GPU, for every rank."""
    adapter.save(attached(), tmp_path, "base")
    monkeypatch.setattr("peft.peft_model.infer_device", lambda: "cuda")
    adapter.load(tiny.llama(), tmp_path)
