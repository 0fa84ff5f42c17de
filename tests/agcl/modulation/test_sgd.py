"""SGD under gates and projections, against torch's own and plain arithmetic."""

import copy

import pytest
import torch
from torch import nn

from agcl.modulation.sgd import GatedSGD

SHAPE = (3, 4)


def trained(steps=6, *, with_torch=False, **options):
    """A weight and a bias after some steps on the same gradients."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(4, 3)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    start = copy.deepcopy(layer)
    if with_torch:
        optimizer = torch.optim.SGD(layer.parameters(), **options)
    else:
        optimizer = GatedSGD(list(layer.named_parameters()), **options)
    for _ in range(steps):
        for parameter in layer.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return start, layer


def test_without_protection_and_with_open_gates_it_is_torchs_sgd_bit_for_bit():
    _, plain = trained(with_torch=True, lr=0.1, momentum=0.9)
    for on in ("update", "gradient"):
        for gate in (None, {"weight": torch.ones(SHAPE)}):
            _, ours = trained(lr=0.1, momentum=0.9, gate=gate, on=on)
            assert torch.equal(ours.weight, plain.weight)
            assert torch.equal(ours.bias, plain.bias)


@pytest.mark.parametrize("decay", [0.0, 0.05])
@pytest.mark.parametrize("on", ["update", "gradient"])
def test_a_constant_gate_scales_every_step_on_either_side_of_the_momentum(on, decay):
    gate = torch.tensor([0.0, 51 / 255, 1.0]).repeat(4, 1).T.contiguous()
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": decay}
    start, ours = trained(**options, gate={"weight": gate}, on=on)
    assert torch.equal(ours.weight[0], start.weight[0])
    weight, velocity = start.weight.detach().double(), torch.zeros(SHAPE, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for shape in (SHAPE, (3,)):
        torch.randn(shape, generator=generator)
    for _ in range(6):
        gradient = torch.randn(SHAPE, generator=generator).double()
        torch.randn((3,), generator=generator)
        velocity = 0.9 * velocity + gradient
        weight = weight - gate * (0.1 * velocity + 0.1 * decay * weight)
    torch.testing.assert_close(ours.weight, weight.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("on", ["update", "gradient"])
def test_no_step_moves_a_projected_direction(on):
    basis = torch.linalg.qr(torch.randn(4, 2, generator=torch.Generator().manual_seed(1)))[0]
    gate = {"weight": torch.full(SHAPE, 0.5)}
    start, ours = trained(lr=0.1, weight_decay=0.1, basis={"weight": basis}, gate=gate, on=on)
    moved = (ours.weight - start.weight).detach()
    assert float((moved @ basis).abs().max()) < 1e-5
    assert float(moved.abs().max()) > 0.1


@pytest.mark.parametrize("on", ["update", "gradient"])
def test_the_step_of_a_closure_is_protected_too(on):
    layer = nn.Linear(4, 3)
    start = layer.weight.detach().clone()
    optimizer = GatedSGD(
        [("weight", layer.weight)], lr=0.1, gate={"weight": torch.zeros(SHAPE)}, on=on
    )

    def closure():
        optimizer.zero_grad()
        loss = layer(torch.ones(1, 4)).sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == pytest.approx(float(start.sum() + layer.bias.sum()))
    assert torch.equal(layer.weight, start)


def test_without_any_gradient_nothing_decays():
    layer = nn.Linear(4, 3)
    start = layer.weight.detach().clone()
    GatedSGD(list(layer.named_parameters()), lr=0.1, weight_decay=0.1).step()
    assert torch.equal(layer.weight, start)
