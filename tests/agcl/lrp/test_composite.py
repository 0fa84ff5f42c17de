"""`relevance_backward` changes no logits and leaves no trace."""

import pytest
import torch
from reference import tiny
from transformers import BloomConfig, BloomForCausalLM

from agcl.errors import InputError
from agcl.lrp import attributed_linears, relevance_backward

IDS = torch.arange(2, 12).view(2, 5)


def logits_of(model):
    return model(IDS, use_cache=False).logits


def flags(model):
    return (
        [(name, p.requires_grad) for name, p in model.named_parameters()],
        [(name, m.training) for name, m in model.named_modules()],
        model.config._attn_implementation,
    )


@pytest.fixture(params=["sdpa", "eager"])
def model(request):
    """A model with mixed flags: part frozen, part in training mode."""
    model = tiny.llama(attention=request.param)
    model.train()
    model.model.layers[0].eval()
    model.lm_head.weight.requires_grad_(False)
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    return model


@pytest.mark.parametrize("rules", ["attnlrp", "cp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_logits_inside_and_outside_are_bit_identical(model, rules, dtype):
    model = model.to(dtype)
    with torch.no_grad():
        outside = logits_of(model)
        with relevance_backward(model, rules):
            inside = logits_of(model)
        again = logits_of(model)
    assert torch.equal(inside, outside)
    assert torch.equal(again, outside)


@pytest.mark.parametrize("rules", ["attnlrp", "cp"])
def test_a_mask_in_place_of_grouped_heads_changes_nothing(rules, monkeypatch):
    """As on a GPU in float32, where torch would hold all attention weights of grouped heads."""
    model = tiny.llama(dtype=torch.float64)
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    found, masks = [], []
    attend = torch.nn.functional.scaled_dot_product_attention

    def seen(*args, **options):
        masks.append(options.get("attn_mask"))
        assert not (options.get("enable_gqa") and masks[-1] is not None)
        return attend(*args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", seen)
    for lacks in (False, True):
        monkeypatch.setattr("agcl.lrp.rules.lacks_kernel", lambda query, key, lacks=lacks: lacks)
        with relevance_backward(model, rules):
            inputs = model.get_input_embeddings()(IDS).detach().requires_grad_()
            logits = model(inputs_embeds=inputs, use_cache=False).logits
            logits[:, -1].sum().backward()
        found.append((logits.detach(), inputs.grad))
    assert {mask is None for mask in masks} == {True, False}
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("rules", ["attnlrp", "cp"])
def test_flags_attention_and_gradients_are_restored(model, rules, gradients):
    before, slopes = flags(model), gradients(model)
    with relevance_backward(model, rules):
        logits_of(model).sum().backward()
        assert not any(p.requires_grad for p in model.parameters())
        assert not any(m.training for m in model.modules())
    assert flags(model) == before
    for name, slope in gradients(model).items():
        assert torch.equal(slope, slopes[name]), name
    assert all(p.grad is None for p in model.parameters())


def test_everything_is_restored_after_an_exception(model, gradients):
    before, slopes = flags(model), gradients(model)

    def fail():
        with relevance_backward(model):
            logits_of(model)
            raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        fail()
    assert flags(model) == before
    for name, slope in gradients(model).items():
        assert torch.equal(slope, slopes[name]), name


def test_gradients_differ_inside_so_that_the_tests_above_can_fail(llama, gradients):
    slopes = gradients(llama)
    with relevance_backward(llama):
        inside = gradients_inside(llama)
    assert not torch.allclose(inside, slopes["model.layers.0.self_attn.q_proj.weight"])


def gradients_inside(model):
    weight = model.model.layers[0].self_attn.q_proj.weight.requires_grad_()
    ids = torch.arange(2, 9).unsqueeze(0)
    output = model(ids, use_cache=False).logits.pow(2).sum()
    return torch.autograd.grad(output, weight)[0]


def test_another_model_of_the_same_class_is_not_affected(llama, gradients):
    other = tiny.llama(seed=1)
    slopes = gradients(other)
    with relevance_backward(llama):
        inside = gradients(other)
    assert all(torch.equal(inside[name], slope) for name, slope in slopes.items())


def test_it_can_be_entered_again_with_other_rules(llama):
    found = []
    for rules in ("attnlrp", "cp", "attnlrp"):
        with tiny.explained(llama, rules) as input_relevance:
            logits_of(llama)[:, -1].max(-1).values.sum().backward()
        found.append(input_relevance())
    assert found[0].shape == IDS.shape
    assert torch.equal(found[0], found[2])
    assert not torch.allclose(found[0], found[1])


def test_relevance_is_available_when_the_caller_disabled_gradients(llama):
    with torch.no_grad(), tiny.explained(llama) as input_relevance:
        logits_of(llama)[:, -1].sum().backward()
        assert torch.isfinite(input_relevance()).all()


def test_an_unsupported_architecture_is_named():
    model = BloomForCausalLM(BloomConfig(vocab_size=16, hidden_size=8, n_layer=1, n_head=2))
    with (
        pytest.raises(InputError, match="BloomForCausalLM"),
        relevance_backward(model),
    ):
        pass
    with pytest.raises(InputError, match="BloomForCausalLM"):
        attributed_linears(model)


def test_unknown_rules_are_refused(llama):
    with pytest.raises(ValueError, match="epsilon"), relevance_backward(llama, "epsilon"):
        pass


def test_all_linear_layers_of_the_decoder_are_attributed_and_the_head_is_not():
    model = tiny.llama(layers=11)  # Layers 1 and 10 must not be confused.
    expected = [
        name
        for name, p in model.named_parameters()
        if p.ndim == 2 and name not in ("lm_head.weight", "model.embed_tokens.weight")
    ]
    linears = attributed_linears(model)
    assert list(linears) == expected
    assert len(expected) == 11 * 7
    parameters = dict(model.named_parameters())
    assert all(module.weight is parameters[name] for name, module in linears.items())
