"""Estimators other than LRP against loops over single samples, and the controls."""

import pytest
import torch
from reference import tiny
from reference.moments import matrices
from reference.moments import whole as whole_moment

from agcl.attribution import attribute
from agcl.importance import Importance, magnitude, permuted, random
from agcl.loss import summed_loss
from agcl.lrp import attributed_linears
from agcl.tasks.batches import collate


@pytest.fixture
def model():
    return tiny.llama(dtype=torch.float64)


def sample_gradients(model, rows):
    """Per sample, the gradients of the answer's log-probability, by weight."""
    found = []
    for row in rows:
        model.zero_grad()
        (-summed_loss(model.double(), collate([row]))).backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    model.zero_grad()
    return found


def estimate(model, rows, estimator, batch_size=3, **settings):
    batches = [collate(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]
    return attribute(model, batches, estimator=estimator, correct_only=False, **settings)


def test_fisher_is_the_mean_of_squared_per_sample_gradients(model):
    rows = tiny.random_rows(7)
    found = estimate(model, rows, "fisher").entries
    gradients = sample_gradients(model, rows)
    for name, entries in found.items():
        expected = torch.stack([g[name] for g in gradients]).square().mean(0)
        # summed_loss computes in float32.
        torch.testing.assert_close(entries, expected, rtol=1e-4, atol=1e-10)


def test_grad_x_param_is_weight_times_gradient_over_the_layers_flow(model):
    rows = tiny.random_rows(3)
    name = "model.layers.0.mlp.up_proj.weight"
    layer = attributed_linears(model)[name]
    expected = torch.zeros_like(layer.weight)
    for row in rows:
        outputs = []
        handle = layer.register_forward_hook(lambda *call, to=outputs: to.append(call[2]))
        batch = collate([row])
        logits = model(batch.input_ids, use_cache=False).logits
        ids = torch.tensor(row.input_ids[row.prompt_tokens :])
        outputs[0].retain_grad()
        model.zero_grad()
        logits[0, row.prompt_tokens - 1 : -1].gather(1, ids[:, None]).sum().backward()
        handle.remove()
        flow = (outputs[0] * outputs[0].grad).abs().sum()
        expected += layer.weight.detach() * layer.weight.grad / flow / len(rows)
    found = estimate(model, rows, "grad_x_param", top_k=None).entries[name]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_das_is_the_standardized_mean_gradient(model):
    rows = tiny.random_rows(5)
    gradients = sample_gradients(model, rows)
    for name, entries in estimate(model, rows, "das").entries.items():
        mean = torch.stack([g[name] for g in gradients]).mean(0)
        expected = ((mean - mean.mean()) / mean.std()).tanh().abs()
        torch.testing.assert_close(entries, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("estimator", ["grad_x_param", "fisher", "das"])
def test_estimates_do_not_depend_on_the_batch_size(model, estimator):
    rows = tiny.random_rows(9)
    whole = estimate(model, rows, estimator, 9, moments="relevance")
    for batch_size in (1, 4):
        other = estimate(model, rows, estimator, batch_size, moments="relevance")
        for name in whole.entries:
            torch.testing.assert_close(other.entries[name], whole.entries[name])
        for name, matrix in matrices(other.moments).items():
            expected = whole.moments[name].matrix()
            torch.testing.assert_close(matrix, expected, rtol=1e-4, atol=1e-4)


def test_estimators_restore_the_model(model):
    before = {name: p.clone() for name, p in model.named_parameters()}
    estimate(model, tiny.random_rows(2), "fisher")
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_the_header_names_the_estimator(model):
    header = estimate(model, tiny.random_rows(2), "fisher").header
    assert (header["estimator"], header["rules"], header["top_k"]) == ("fisher", "gradient", None)


@pytest.fixture
def importance():
    generator = torch.Generator().manual_seed(0)
    entries = {
        "a": torch.randn(3, 4, generator=generator),
        "b": torch.randn(5, generator=generator),
    }
    return Importance(entries, {"a": whole_moment(torch.eye(4))}, {"estimator": "lrp"})


def test_permuted_shuffles_the_values(importance):
    shuffled = permuted(importance, seed=1)
    for name, entries in importance.entries.items():
        other = shuffled.entries[name]
        assert not torch.equal(other, entries)
        assert torch.equal(other.flatten().sort().values, entries.flatten().sort().values)
        assert torch.equal(permuted(importance, seed=1).entries[name], other)
        assert not torch.equal(permuted(importance, seed=2).entries[name], other)
    assert shuffled.moments is importance.moments


def test_random_depends_only_on_the_seed(importance):
    first, again, other = (random(importance, seed=seed).entries["a"] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (3, 4)
    assert 0 <= first.min() <= first.max() < 1


def test_magnitudes_lie_in_main_memory_one_layer_after_the_other(model, importance, monkeypatch):
    moved, cpu = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda t: moved.append(t.shape) or cpu(t))
    linears = attributed_linears(model)
    magnitude(importance, linears)
    assert moved == [layer.weight.shape for layer in linears.values()]


def test_magnitude_is_the_absolute_weight(model, importance):
    linears = attributed_linears(model)
    for name, entries in magnitude(importance, linears).entries.items():
        assert torch.equal(entries, linears[name].weight.abs())
