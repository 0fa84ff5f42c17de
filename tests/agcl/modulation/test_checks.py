"""The self-checks on correct gated and projected steps, and on broken ones."""

from itertools import product

import pytest
import torch
from reference.variants import slow
from torch import nn

from agcl.modulation import GatedAdamW
from agcl.modulation.checks import ProtectionFailed, check, sampled


def steps(
    gate=None,
    basis=None,
    lr=1e-3,
    count=200,
    size=1.0,
    seed=0,
    on="update",
    dtype=torch.float32,
):
    """A weight before and after steps on random gradients with a trend."""
    generator = torch.Generator().manual_seed(seed)
    start = (torch.randn(24, 16, generator=generator) * size).to(dtype)
    weight = nn.Parameter(start.clone())
    trend = torch.randn(24, 16, generator=generator)
    optimizer = GatedAdamW(
        [("w", weight)], gate=gate, basis=basis, lr=lr, on=on, rounding="stochastic"
    )
    for _ in range(count):
        weight.grad = (trend + torch.randn(24, 16, generator=generator)).to(dtype)
        optimizer.step()
    return {"w": start}, {"w": weight.detach()}


@pytest.fixture
def gate():
    return {"w": torch.rand(24, 16, generator=torch.Generator().manual_seed(1))}


@pytest.fixture
def basis():
    square = torch.randn(16, 16, generator=torch.Generator().manual_seed(2))
    return {"w": torch.linalg.qr(square)[0][:, :4].contiguous()}


def movement(before, after, gate):
    measured = check(before, after, gate=gate, on="gradient", basis=None, steps=200)
    return measured["movement_by_decile"]


def test_protected_deciles_move_less(gate):
    by_decile = movement(*steps(gate), gate)
    assert len(by_decile) == 10
    assert by_decile[0] > 1.2
    assert by_decile[-1] < 0.3


def test_movement_is_the_median_of_each_tenth():
    before = {"w": torch.zeros(10, 3)}
    after = {"w": torch.arange(30.0).view(10, 3)}
    gate = {"w": torch.linspace(1, 0, 30).view(10, 3)}
    median = torch.arange(30.0).median().item()
    expected = [(3 * i + 1) / median for i in range(10)]
    assert movement(before, after, gate) == pytest.approx(expected)


def test_unmoved_weights_give_zeros(gate):
    start = {"w": torch.ones(24, 16)}
    assert movement(start, start, gate) == [0.0] * 10


def test_leak_is_one_for_an_isotropic_change_and_zero_for_a_projected_one(basis):
    generator = torch.Generator().manual_seed(3)
    before = {"w": torch.zeros(4000, 16)}
    after = {"w": torch.randn(4000, 16, generator=generator)}
    with pytest.raises(ProtectionFailed, match=r"w changed by (1|0\.9\d*|1\.0\d*) times"):
        check(before, after, gate=None, on="update", basis=basis, steps=200)
    measured = check(*steps(basis=basis), gate=None, on="update", basis=basis, steps=200)
    assert measured["projection_leak"] < 1e-4
    assert measured["directions_taken"] == 0.25


@pytest.mark.parametrize(
    ("size", "lr"), [*product([1e-2, 1.0], [1e-2, 1e-4, 1e-6]), (30.0, 1e-2), (30.0, 1e-4)]
)
@pytest.mark.parametrize("count", [1, 20, *slow(1000)])
def test_correct_projections_never_fail(basis, size, lr, count):
    for seed in range(3 if count < 100 else 1):
        before, after = steps(basis=basis, size=size, lr=lr, count=count, seed=seed)
        check(before, after, gate=None, on="update", basis=basis, steps=count)


@pytest.mark.parametrize("size", [1e-2, 1.0])
@pytest.mark.parametrize("lr", [1e-2, 1e-3, 1e-5])
@pytest.mark.parametrize("count", [1, 20, *slow(300)])
def test_correct_protections_of_bfloat16_never_fail(basis, gate, size, lr, count):
    for seed in range(3 if count < 100 else 1):
        options = {"size": size, "lr": lr, "count": count, "seed": seed, "dtype": torch.bfloat16}
        run = {"on": "update", "steps": count, "learning_rate": lr}
        pair = steps(basis=basis, **options)
        check(*pair, gate=None, basis=basis, **run)
        check(*steps(gate, **options), gate=gate, basis=None, **run)
        large = {"w": (pair[0]["w"].abs() < size / 2).float() * 0.4 + 0.1}  # Rounded coarsest.
        check(*steps(large, **options), gate=large, basis=None, **run)


@pytest.mark.parametrize(("size", "lr"), [(1.0, 1e-2), (2e-2, 1e-5)])
def test_lost_protections_of_bfloat16_fail(basis, gate, size, lr):
    """Also with steps of a twentieth of the gap between large weights."""
    for seed in range(3):
        run = {"on": "update", "steps": 200, "learning_rate": lr}
        pair = steps(size=size, lr=lr, seed=seed, dtype=torch.bfloat16)
        with pytest.raises(ProtectionFailed, match=r"w changed by [\d.]+ times an unprotected upd"):
            check(*pair, gate=None, basis=basis, **run)
        options = {"size": size, "lr": lr, "seed": seed, "dtype": torch.bfloat16}
        pair = steps({"w": 1 - gate["w"]}, **options)
        with pytest.raises(ProtectionFailed, match="gate does not hold"):
            check(*pair, gate=gate, basis=None, **run)


def test_a_sample_has_the_same_outputs_in_either_layout_and_finds_what_is_lost():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2000, 16, generator=generator)
    few = sampled(weight)
    assert few.shape == (512, 16)
    assert torch.equal(sampled(weight.T, transposed=True), few.T)
    assert torch.equal(sampled(few), few)
    basis = {"w": torch.eye(16)[:, :4]}
    change = torch.randn(2000, 16, generator=generator)
    change[:, :4] = 0
    held, lost = weight + change, weight + change
    lost[1000:] += 1.0  # In half of the outputs.
    check({"w": few}, {"w": sampled(held)}, gate=None, on="update", basis=basis, steps=9)
    with pytest.raises(ProtectionFailed, match="w changed by"):
        check({"w": few}, {"w": sampled(lost)}, gate=None, on="update", basis=basis, steps=9)


@pytest.mark.parametrize("protected", [False, *slow(True)])
def test_no_number_of_steps_excuses_a_lost_projection(basis, protected):
    """Unprotected, or with steps below the weights' precision: both leak."""
    before, after = steps(basis=basis if protected else None, lr=1e-7, count=10_000)
    with pytest.raises(ProtectionFailed, match=r"w changed by .* raise the learning rate$"):
        check(before, after, gate=None, on="update", basis=basis, steps=10_000)


@pytest.mark.parametrize("on", ["update", "gradient"])
@pytest.mark.parametrize("lr", [1e-2, *slow(1e-6)])
def test_correct_gates_never_fail(gate, on, lr):
    for seed in range(5):
        for some in (gate, {"w": torch.ones(24, 16)}, {"w": gate["w"] * 0.05 + 0.9}):
            before, after = steps(some, lr=lr, seed=seed, on=on)
            check(before, after, gate=some, on=on, basis=None, steps=200)


def test_a_missing_projection_fails_and_names_the_layer(basis):
    with pytest.raises(ProtectionFailed, match="w changed by"):
        check(*steps(), gate=None, on="update", basis=basis, steps=200)


def test_an_inverted_gate_fails(gate):
    before, after = steps({"w": 1 - gate["w"]})
    with pytest.raises(ProtectionFailed, match="gate does not hold"):
        check(before, after, gate=gate, on="update", basis=None, steps=200)


def test_a_missing_protection_is_reported_as_none(gate, basis):
    only_gate = check(*steps(gate), gate=gate, on="update", basis=None, steps=200)
    assert only_gate["projection_leak"] is None
    assert only_gate["directions_taken"] is None
    both = check(*steps(gate, basis), gate=gate, on="update", basis=basis, steps=200)
    assert all(value is not None for value in both.values())


def test_protected_weights_with_steps_that_agree_may_move_further():
    """Steps that agree add up to sqrt(steps) times those that do not."""
    gate = {"w": torch.cat([torch.full((50,), 0.9), torch.full((50,), 0.6)])}
    before = {"w": torch.zeros(100)}
    after = {"w": torch.cat([torch.full((50,), 0.1), torch.full((50,), 0.6)])}
    check(before, after, gate=gate, on="update", basis=None, steps=100)
    with pytest.raises(ProtectionFailed, match="gate does not hold"):
        check(before, after, gate=gate, on="update", basis=None, steps=25)
