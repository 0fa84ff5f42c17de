"""Every LRP rule against its Jacobian: relevance x·g must match the rule's matrix."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.autograd.functional import jacobian
from torch.nn.functional import scaled_dot_product_attention

from agcl.lrp import rules
from agcl.lrp.families import gemma_norm, layer_norm, rms_norm

ACTIVATIONS = [nn.functional.silu, nn.functional.gelu, torch.tanh, torch.relu]
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def gradient_of(output, *inputs, towards):
    return torch.autograd.grad(output, inputs, towards)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_identity_rule_passes_each_units_relevance(activation):
    x = random(3, 7).requires_grad_()
    y = activation(x)

    result = rules.identity(x, y)
    (gradient,) = gradient_of(result, x, towards=(towards := random(3, 7, seed=1)))

    assert torch.equal(result, y)
    torch.testing.assert_close(x * gradient, y * towards, **CLOSE)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_identity_rule_is_finite_at_and_near_zero(activation, dtype):
    tiny = torch.finfo(dtype).tiny
    x = torch.tensor([0.0, -0.0, tiny, -tiny, 1e-6, -1e-6], dtype=dtype, requires_grad=True)

    result = rules.identity(x, activation(x))
    (gradient,) = gradient_of(result, x, towards=torch.full_like(x, 3.0))

    assert torch.isfinite(gradient).all()
    assert (gradient.abs() <= 3.1).all()
    assert torch.equal((x * gradient)[:2], torch.zeros(2, dtype=dtype))


def rms(x, epsilon):
    return (x.pow(2).mean() + epsilon).sqrt()


def deviation(x, epsilon):
    return (x.var(unbiased=False) + epsilon).sqrt()


W, B = random(5, seed=1), random(5, seed=3)
NORMS = {
    "rms": (
        rms_norm,
        SimpleNamespace(weight=W, variance_epsilon=0.1),
        lambda x, of: W * x / rms(of, 0.1),
    ),
    "gemma": (
        gemma_norm,
        # Gemma's norms compute in float32.
        SimpleNamespace(weight=W, eps=0.1),
        lambda x, of: (1 + W.float()) * x / rms(of, 0.1),
    ),
    "layer": (
        layer_norm,
        SimpleNamespace(weight=W, bias=B, eps=0.1),
        lambda x, of: W * (x - x.mean()) / deviation(of, 0.1) + B,
    ),
}


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_rule_is_the_jacobian_with_constant_scale(name):
    rule, module, function = NORMS[name]
    x = random(5).requires_grad_()
    fixed = x.detach()
    y = function(x, x)

    result = rule(module, x, y)
    (gradient,) = gradient_of(result, x, towards=(towards := random(5, seed=2)))

    assert torch.equal(result, y)
    expected = jacobian(lambda v: function(v, fixed), fixed).T @ towards
    torch.testing.assert_close(gradient, expected, **CLOSE)
    ordinary = jacobian(lambda v: function(v, v), fixed).T @ towards
    assert (expected - ordinary).abs().max() > 0.01, "the scale must matter here"
    if name != "layer":  # Without bias and centering all relevance passes.
        torch.testing.assert_close(x * gradient, y * towards, **CLOSE)


@pytest.mark.parametrize("factor", [0.5, 0.25])
def test_a_scaled_gradient_is_that_fraction_of_the_jacobian(factor):
    x = random(4).requires_grad_()

    result = rules.scale_gradient(x, factor)
    (gradient,) = gradient_of(result, x, towards=(towards := random(4, seed=1)))

    assert torch.equal(result, x)
    torch.testing.assert_close(gradient, factor * torch.eye(4, dtype=x.dtype) @ towards, **CLOSE)


def mix(query, key, value):
    return scaled_dot_product_attention(query, key, value, is_causal=True)


@pytest.mark.parametrize(("name", "share"), [("query", 0.25), ("key", 0.25), ("value", 0.5)])
def test_attnlrp_gives_attention_inputs_their_share_of_the_jacobian(name, share):
    operands = {n: random(1, 2, 3, 4, seed=i) for i, n in enumerate(("query", "key", "value"))}
    towards = random(1, 2, 3, 4, seed=9)
    slope = jacobian(lambda t: mix(**{**operands, name: t}), operands[name])
    expected = share * torch.einsum("bhtdxyzw,bhtd->xyzw", slope, towards)

    operands[name].requires_grad_()
    ruled = rules.attention_inputs(*operands.values(), rules="attnlrp")
    (gradient,) = gradient_of(mix(*ruled), operands[name], towards=towards)

    torch.testing.assert_close(gradient, expected, **CLOSE)


def test_attnlrp_halves_the_product_with_the_value():
    """With constant attention weights the value gets half of the output's relevance."""
    query = key = torch.zeros(1, 1, 3, 4, dtype=torch.float64)
    value, towards = random(1, 1, 3, 4).requires_grad_(), random(1, 1, 3, 4, seed=1)

    mixed = mix(*rules.attention_inputs(query, key, value, "attnlrp"))
    (gradient,) = gradient_of(mixed, value, towards=towards)

    half = 0.5 * (mixed * towards).sum()
    torch.testing.assert_close((value * gradient).sum(), half, **CLOSE)


def test_cp_sends_all_attention_relevance_to_the_value():
    query, key, value = (random(1, 2, 3, 4, seed=i).requires_grad_() for i in range(3))
    towards = random(1, 2, 3, 4, seed=9)

    mixed = mix(*rules.attention_inputs(query, key, value, "cp"))
    found = torch.autograd.grad(mixed, (query, key, value), towards, allow_unused=True)

    assert found[0] is None
    assert found[1] is None
    torch.testing.assert_close((value * found[2]).sum(), (mixed * towards).sum(), **CLOSE)


def test_the_attention_wrapper_forwards_mask_and_options():
    seen = {}

    def base(module, query, key, value, attention_mask, **options):
        seen.update(options, module=module, mask=attention_mask)
        return query + 2 * key + 3 * value, None

    module, mask = nn.Identity(), torch.ones(1)
    query, key, value = (random(2, seed=i) for i in range(3))

    wrapped = rules.attention(base, "attnlrp")
    output, _ = wrapped(module, query, key, value, mask, scaling=0.3, dropout=0.0)

    assert torch.equal(output, query + 2 * key + 3 * value)
    assert seen == {"module": module, "mask": mask, "scaling": 0.3, "dropout": 0.0}
