"""GatedAdamW: torch's AdamW where the gate is open, no movement where it is closed."""

import copy

import pytest
import torch
from reference import tiny
from torch import nn

from agcl.lrp import attributed_linears
from agcl.model import adapter
from agcl.modulation import GatedAdamW

UP = "model.layers.0.mlp.up_proj.weight"
SIDES = ["update", "gradient"]
OPTIONS = {"lr": 3e-3, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-6}


def steps(model, optimizer, *, first=0, last=20):
    """Optimizer steps on batches that depend only on the step number."""
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(2, tiny.VOCABULARY, (2, 6), generator=generator)
        optimizer.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def filled(model, value):
    return {n: torch.full_like(m.weight, value) for n, m in attributed_linears(model).items()}


def assert_same(found, expected):
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


@pytest.mark.parametrize("on", SIDES)
@pytest.mark.parametrize("gated", [True, False])
def test_with_an_open_gate_steps_are_bit_identical_to_adamw(llama, on, gated):
    plain = copy.deepcopy(llama)
    steps(plain, torch.optim.AdamW(plain.parameters(), fused=True, **OPTIONS))
    gate = filled(llama, 1.0) if gated else None
    steps(llama, GatedAdamW(llama.named_parameters(), gate=gate, on=on, **OPTIONS))
    assert_same(weights(llama), weights(plain))


@pytest.mark.parametrize("on", SIDES)
def test_a_closed_gate_keeps_every_bit_and_does_not_affect_other_weights(llama, on):
    before = weights(llama)
    gate = filled(llama, 0.0)
    gate[UP] = (torch.arange(24 * 16) % 2).float().view(24, 16)
    steps(llama, GatedAdamW(llama.named_parameters(), gate=gate, on=on, **OPTIONS))
    after = weights(llama)
    for name, closed in gate.items():
        still = closed == 0
        assert torch.equal(after[name][still], before[name][still]), name
        assert (after[name][~still] != before[name][~still]).all(), name
    assert not torch.equal(after["lm_head.weight"], before["lm_head.weight"])


def adamw_by_hand(weight, gradients, gate, on):
    """Scalar AdamW in Python floats, one value at a time; the gate acts as documented."""
    lr, decay, (beta1, beta2), eps = OPTIONS.values()
    mean = square = 0.0
    for t, gradient in enumerate(gradients, start=1):
        decay_by = lr * decay * weight
        if on == "gradient":
            gradient, decay_by = gate * gradient, gate * decay_by
        mean = beta1 * mean + (1 - beta1) * gradient
        square = beta2 * square + (1 - beta2) * gradient**2
        slope = mean / (1 - beta1**t) / ((square / (1 - beta2**t)) ** 0.5 + eps)
        change = -decay_by - lr * slope
        weight += gate * change if on == "update" else change
    return weight


def test_any_gate_is_stored_in_a_byte_to_half_a_step(llama):
    generator = torch.Generator().manual_seed(1)
    gate = {UP: torch.rand(24, 16, generator=generator)}
    before = weights(llama)[UP]
    free, held = copy.deepcopy(llama), copy.deepcopy(llama)
    steps(free, GatedAdamW(free.named_parameters(), **OPTIONS), last=1)
    optimizer = GatedAdamW(held.named_parameters(), gate=gate, **OPTIONS)
    steps(held, optimizer, last=1)
    (kept,) = optimizer.protection.held.values()
    assert kept.element_size() == 1
    share = (weights(held)[UP] - before) / (weights(free)[UP] - before)
    torch.testing.assert_close(share, gate[UP], rtol=0, atol=0.5 / 255 + 1e-4)


@pytest.mark.parametrize("on", SIDES)
def test_a_fractional_gate_equals_the_closed_form(on):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    gate = torch.tensor([[0.0, 0.2, 0.4], [0.6, 0.8, 1.0]], dtype=torch.float64)
    slopes = torch.randn(7, 2, 3, generator=generator, dtype=torch.float64)
    parameter = nn.Parameter(start.clone())
    optimizer = GatedAdamW([("w", parameter)], gate={"w": gate}, on=on, **OPTIONS)
    for slope in slopes:
        parameter.grad = slope.clone()
        optimizer.step()
    for row in range(2):
        for column in range(3):
            place = row, column
            series = [float(s[place]) for s in slopes]
            expected = adamw_by_hand(float(start[place]), series, float(gate[place]), on)
            assert parameter[place].item() == pytest.approx(expected, rel=1e-12), place


def test_a_constant_gate_on_the_gradient_cancels_and_on_the_update_does_not(llama):
    """Why `update` is the default: Adam divides by the gradient's running magnitude."""
    moved = {}
    for on in SIDES:
        model = copy.deepcopy(llama)
        before = weights(model)[UP]
        gate = {UP: torch.full_like(before, 0.2)}
        options = {**OPTIONS, "weight_decay": 0.0, "eps": 1e-12}
        steps(model, GatedAdamW(model.named_parameters(), gate=gate, on=on, **options), last=1)
        moved[on] = (weights(model)[UP] - before).abs().mean().item()
    assert moved["update"] == pytest.approx(0.2 * moved["gradient"], rel=1e-2)


@pytest.mark.parametrize("option", ["gate", "basis"])
def test_an_unknown_name_or_wrong_shape_is_refused(llama, option):
    width = 24 if option == "gate" else 16
    for name, tensor in (
        ("model.layers.9.mlp.up_proj.weight", torch.ones(width, 16)),
        (UP, torch.ones(width + 1, 16)),
    ):
        with pytest.raises(ValueError, match=name):
            GatedAdamW(llama.named_parameters(), **{option: {name: tensor}}, lr=1e-3)


@pytest.mark.parametrize("on", SIDES)
def test_a_run_resumes_bit_for_bit_from_its_state(tmp_path, llama, on):
    gate = {n: torch.full_like(g, 0.3) for n, g in filled(llama, 1.0).items()}
    gate[UP] = torch.linspace(0, 1, 24 * 16).view(24, 16)
    basis = {UP: torch.eye(16)[:, :3]}
    whole = copy.deepcopy(llama)

    def optimizer(model):
        named = model.named_parameters()
        return GatedAdamW(named, gate=gate, basis=basis, on=on, **OPTIONS)

    steps(whole, optimizer(whole), last=8)

    first = optimizer(llama)
    steps(llama, first, last=4)
    torch.save({"model": llama.state_dict(), "optimizer": first.state_dict()}, tmp_path / "state")

    stored = torch.load(tmp_path / "state")
    resumed = tiny.llama(seed=5)
    resumed.load_state_dict(stored["model"])
    second = optimizer(resumed)
    second.load_state_dict(stored["optimizer"])
    steps(resumed, second, first=4, last=8)

    assert_same(weights(resumed), weights(whole))


def test_parameters_without_a_gradient_do_not_change(llama):
    llama.lm_head.weight.requires_grad_(False)
    before = weights(llama)
    trainable = [(n, p) for n, p in llama.named_parameters() if p.requires_grad]
    optimizer = GatedAdamW(trainable, **OPTIONS)
    optimizer.step()
    assert_same(weights(llama), before)
    steps(llama, optimizer, last=2)
    assert torch.equal(llama.lm_head.weight, before["lm_head.weight"])


def test_a_closure_is_called_with_gradients_on():
    parameter = nn.Parameter(torch.ones(2, 2))
    optimizer = GatedAdamW([("w", parameter)], gate={"w": torch.ones(2, 2)}, **OPTIONS)

    def closure():
        loss = parameter.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 4.0
    assert (parameter < 1).all()


def protected_steps(llama, on, device="cpu"):
    """Weights after three steps with gates, bases, both or neither."""
    generator = torch.Generator().manual_seed(0)
    names = [n for n, p in llama.named_parameters() if p.dim() == 2 and "embed" not in n]
    shapes = {n: llama.get_parameter(n).shape for n in names}
    gate = {n: torch.rand(shapes[n], generator=generator) for n in names[::2]}
    basis = {
        n: torch.linalg.qr(torch.randn(shapes[n][1], 3, generator=generator))[0] for n in names[::3]
    }
    model = copy.deepcopy(llama)
    for number, parameter in enumerate(model.parameters()):
        parameter.data = parameter.data.to(device)
        drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        parameter.grad = drawn.to(device)
    options = {"gate": gate, "basis": basis, "on": on, "lr": 0.1, "weight_decay": 0.1}
    optimizer = GatedAdamW(model.named_parameters(), **options)
    for _ in range(3):
        optimizer.step()
    return {n: p.detach().cpu() for n, p in model.named_parameters()}


@pytest.mark.parametrize("on", SIDES)
def test_many_parameters_at_once_step_like_each_alone(llama, on, monkeypatch):
    alone = protected_steps(llama, on)
    monkeypatch.setattr("agcl.modulation.step._chunks", lambda pieces: [pieces] * bool(pieces))
    torch.testing.assert_close(protected_steps(llama, on), alone, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("on", SIDES)
def test_steps_on_a_gpu_equal_those_on_a_cpu(llama, on):
    found, expected = protected_steps(llama, on, "cuda"), protected_steps(llama, on)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["gate", "basis"])
def test_protection_follows_a_model_that_moves_to_the_gpu_later(kind):
    layer = torch.nn.Linear(6, 4, bias=False)
    protection = {"gate": torch.zeros(4, 6), "basis": torch.eye(6)}[kind]
    optimizer = GatedAdamW(layer.named_parameters(), **{kind: {"weight": protection}})
    layer.cuda()
    before = layer.weight.detach().clone()
    layer(torch.randn(3, 6, device="cuda")).sum().backward()
    optimizer.step()
    torch.testing.assert_close(layer.weight, before, rtol=0, atol=1e-7)


@pytest.mark.parametrize("protection", ["gate", "basis"])
def test_protected_weights_in_half_precision_are_refused(protection):
    model = tiny.llama(dtype=torch.bfloat16)
    name = "model.layers.0.mlp.up_proj.weight"
    shape = model.get_parameter(name).shape if protection == "gate" else (16, 2)
    with pytest.raises(ValueError, match=rf"{name} is in torch\.bfloat16.*dtype=torch\.float32"):
        GatedAdamW(model.named_parameters(), **{protection: {name: torch.ones(shape)}})


def test_names_of_a_peft_wrapper_say_what_to_pass_instead(llama):
    name = "model.layers.0.mlp.up_proj.weight"
    gate = {name: torch.ones_like(llama.get_parameter(name))}
    wrapped = adapter.attach(llama, rank=2, alpha=2.0, seed=0)
    with pytest.raises(ValueError, match=r"get_base_model\(\)\.named_parameters"):
        GatedAdamW(wrapped.named_parameters(), gate=gate)


def test_an_unknown_side_is_refused(llama):
    with pytest.raises(ValueError, match="on must be one of"):
        GatedAdamW(llama.named_parameters(), on="weights")


def test_states_that_were_read_onto_the_cpu_move_to_the_parameters_device():
    """A Trainer on one GPU reads them so; torch moves `step` only for groups with `fused`."""
    weight = nn.Parameter(torch.ones(4, 3))
    weight.grad = torch.ones(4, 3)
    optimizer = GatedAdamW([("w", weight)])
    optimizer.step()
    elsewhere = nn.Parameter(torch.empty(4, 3, device="meta"))
    resumed = GatedAdamW([("w", elsewhere)])
    resumed.load_state_dict(optimizer.state_dict())
    assert {t.device.type for t in resumed.state[elsewhere].values()} == {"meta"}
