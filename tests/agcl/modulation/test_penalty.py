"""EWC's penalty against autograd, and in training."""

import pytest
import torch
from reference import tiny
from reference.moments import whole
from torch import nn

from agcl.importance import Importance
from agcl.modulation import GatedAdamW, quadratic_penalty
from agcl.train import train_task


@pytest.fixture
def parameters():
    generator = torch.Generator().manual_seed(0)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
        for name, shape in (("a", (3, 4)), ("b", (2, 3)), ("free", (5,)))
    }


@pytest.fixture
def past():
    generator = torch.Generator().manual_seed(1)
    return [
        Importance(
            {n: torch.randn(s, generator=generator) for n, s in (("a", (3, 4)), ("b", (2, 3)))}
        )
        for _ in range(2)
    ]


def test_value_and_gradient_equal_those_of_the_quadratic_form(parameters, past):
    anchors = {name: p.detach().clone() for name, p in parameters.items()}
    penalise = quadratic_penalty(parameters, past, strength=3.0)
    with torch.no_grad():
        for p in parameters.values():
            p.add_(torch.linspace(-1, 1, p.numel(), dtype=p.dtype).view_as(p))

    def slow(a, b):
        total = torch.zeros((), dtype=torch.float64)
        for name, p in (("a", a), ("b", b)):
            for importance in past:
                f = importance.entries[name].double().clamp(min=0)
                total = total + 1.5 * (f * (p - anchors[name]) ** 2).sum()
        return total

    a, b = parameters["a"], parameters["b"]
    expected = torch.autograd.grad(slow(a, b), (a, b))
    a.grad = torch.ones_like(a)
    torch.testing.assert_close(penalise().double(), slow(a, b), rtol=1e-6, atol=0)
    torch.testing.assert_close(a.grad, expected[0] + 1)
    torch.testing.assert_close(b.grad, expected[1])
    assert parameters["free"].grad is None
    parameters["b"].requires_grad_(False).grad = None
    penalise()
    assert parameters["b"].grad is None  # Nobody would clear it.
    # Its Hessian is the diagonal λ ΣF: the penalty is EWC's second-order expansion.
    hessian = torch.autograd.functional.hessian(lambda x: slow(x, b), a).reshape(12, 12)
    fisher = sum(i.entries["a"].double().clamp(min=0) for i in past)
    torch.testing.assert_close(hessian, torch.diag(3.0 * fisher.flatten()))


def test_of_bfloat16_weights_only_the_gradient_is_rounded(parameters, past):
    half = {name: nn.Parameter(p.detach().bfloat16()) for name, p in parameters.items()}
    exact = {name: nn.Parameter(p.detach().float()) for name, p in half.items()}
    penalties = [quadratic_penalty(each, past, strength=3.0) for each in (half, exact)]
    for each in (half, exact):
        for p in each.values():
            p.data.mul_(1.25)  # Nothing is rounded by it but the last bits of bfloat16.
    for name, p in exact.items():
        p.data.copy_(half[name].data)
    half["a"].grad, exact["a"].grad = torch.ones(3, 4).bfloat16(), torch.ones(3, 4)
    found, expected = (penalise() for penalise in penalties)
    assert found == expected > 0
    for name in ("a", "b"):
        assert torch.equal(half[name].grad, exact[name].grad.bfloat16())


def test_at_the_anchor_nothing_is_added(parameters, past):
    parameters["a"].grad = torch.full_like(parameters["a"], 0.1)
    assert quadratic_penalty(parameters, past, strength=5.0)() == 0
    assert torch.equal(parameters["a"].grad, torch.full_like(parameters["a"], 0.1))


def test_another_models_importance_is_refused(parameters):
    with pytest.raises(ValueError, match="no parameter c of shape"):
        quadratic_penalty(parameters, [Importance({"c": torch.ones(1)})], strength=1.0)


@pytest.mark.parametrize("strength", [0.0, 1e6])
def test_a_large_strength_keeps_weights_in_place_during_training(strength):
    start = tiny.llama()
    name = "model.layers.0.mlp.up_proj.weight"

    def trained(penalised):
        model = tiny.llama()
        named = dict(model.named_parameters())
        past = [Importance({name: torch.ones_like(named[name])})]
        train_task(
            model,
            tiny.random_rows(8),
            GatedAdamW(named.items(), lr=1e-3),
            epochs=10,
            batch_size=4,
            micro_batch_size=4,
            seed=0,
            penalise=quadratic_penalty(named, past, strength=strength) if penalised else None,
        )
        return dict(model.named_parameters())

    free, held = trained(False), trained(True)
    before = dict(start.named_parameters())[name]
    if strength == 0:
        assert all(torch.equal(free[n], held[n]) for n in free)
    else:
        assert (held[name] - before).norm() < 0.5 * (free[name] - before).norm()


def test_a_penalty_needs_entries_and_a_strength(parameters, past):
    for importances in ([], [Importance({}, {"a": whole(torch.eye(4))})]):
        with pytest.raises(ValueError, match="with entries"):
            quadratic_penalty(parameters, importances, strength=1.0)
    with pytest.raises(ValueError, match="strength must be at least 0"):
        quadratic_penalty(parameters, past, strength=-1.0)
