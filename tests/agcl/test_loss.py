"""Losses that look at a frozen reference model, against plain formulas in float64."""

import copy
import math

import pytest
import torch
from reference import tiny
from torch.nn.functional import cross_entropy

from agcl.loss import anchored_loss, frozen, summed_loss, without_adapter
from agcl.model import adapter
from agcl.tasks.batches import collate, pack

STRENGTH = 0.7


def token_by_token(model, reference, rows, *, form, weighting="uniform", most=math.inf):
    """The loss from each answer token's two distributions, in float64."""
    total = torch.zeros((), dtype=torch.float64)
    for ids, prompt_tokens, *_ in rows:
        p, q = (
            each(torch.tensor([ids]), use_cache=False).logits[0].double().softmax(-1)
            for each in (model, reference)
        )
        for place in range(prompt_tokens, len(ids)):
            p_all, q_all, token = p[place - 1], q[place - 1], ids[place]
            weight = p_all[token].detach() if weighting == "probability" else 1.0
            if 1 / q_all[token] <= most:
                total = total - weight * p_all[token].log()
            if form == "forward":
                total = total + STRENGTH * (q_all * (q_all / p_all).log()).sum()
            if form == "reverse":
                ratio = q_all[token] / p_all[token]
                total = total + STRENGTH * (ratio - ratio.log() - 1)
    return total


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("form", ["forward", "reverse"])
@pytest.mark.parametrize("weighting", ["uniform", "probability"])
@pytest.mark.parametrize("batched", [collate, pack])
def test_value_and_gradient_are_those_of_the_formula(form, weighting, batched):
    model, reference = tiny.llama(dtype=torch.float64), tiny.llama(dtype=torch.float64, seed=1)
    rows = tiny.random_rows(5)
    loss_of = anchored_loss(frozen(reference), strength=STRENGTH, form=form, weighting=weighting)
    loss = loss_of(model, batched(rows))
    expected = token_by_token(model, reference, rows, form=form, weighting=weighting)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    found, slow = gradients(model, loss), gradients(model, expected)
    for name, gradient in slow.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)


def test_the_divergence_from_the_model_itself_adds_nothing():
    model, rows = tiny.llama(), tiny.random_rows(5)
    batch = collate(rows)
    plain = gradients(model, summed_loss(model, batch))
    for form in ("forward", "reverse"):
        loss_of = anchored_loss(frozen(copy.deepcopy(model)), strength=10.0, form=form)
        loss = loss_of(model, batch)
        assert float(loss) == pytest.approx(float(summed_loss(model, batch)), rel=1e-5)
        for name, gradient in gradients(model, loss).items():
            torch.testing.assert_close(gradient, plain[name], rtol=1e-3, atol=1e-4)


def test_tokens_that_surprise_the_reference_are_left_out():
    model, reference = tiny.llama(), tiny.llama(seed=1)
    rows = tiny.random_rows(6)
    values = {}
    for most in (1.5, 40.0, 1e6):
        loss_of = anchored_loss(frozen(reference), strength=0.0, max_perplexity=most)
        values[most] = float(loss_of(model, collate(rows)))
        expected = token_by_token(model, reference, rows, form=None, most=most)
        assert values[most] == pytest.approx(float(expected), rel=1e-5)
    assert values[1.5] < values[40.0] < values[1e6]  # Each limit drops some.
    assert values[1e6] == pytest.approx(float(summed_loss(model, collate(rows))), rel=1e-6)


def test_own_probability_weights_tokens_without_a_reference():
    model, rows = tiny.llama(dtype=torch.float64), tiny.random_rows(4)
    loss = anchored_loss(None, strength=5.0, weighting="probability")(model, collate(rows))
    expected = 0.0
    for ids, prompt_tokens, *_ in rows:
        logits = model(torch.tensor([ids]), use_cache=False).logits[0]
        for place in range(prompt_tokens, len(ids)):
            nats = cross_entropy(logits[place - 1], torch.tensor(ids[place]))
            expected = expected + nats * torch.exp(-nats).detach()
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    slow = gradients(model, expected)
    for name, gradient in gradients(model, loss).items():
        torch.testing.assert_close(gradient, slow[name], rtol=1e-4, atol=1e-5)


def test_a_model_without_its_adapter_is_its_own_reference():
    base, rows = tiny.llama(), tiny.random_rows(4)
    reference = frozen(copy.deepcopy(base))
    model = adapter.attach(base, rank=2, alpha=4.0, seed=0).get_base_model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.uniform_(-0.5, 0.5)
    model.train()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    batch = collate(rows)
    with torch.no_grad():
        torch.testing.assert_close(without_adapter(model, batch), reference(model, batch))
    assert model.training
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}
    loss = anchored_loss(without_adapter, strength=STRENGTH)(model, batch)
    other = anchored_loss(reference, strength=STRENGTH)(model, batch)
    assert float(loss) == pytest.approx(float(other), rel=1e-6)
    loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if n in trained)
