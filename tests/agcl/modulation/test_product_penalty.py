"""EWC-LoRA: the penalty on the product of new factors, against autograd and EWC of the weights."""

import pytest
import torch
from reference import families

from agcl.importance import Importance
from agcl.lrp import attributed_linears
from agcl.model import adapter
from agcl.modulation import lora, quadratic_penalty

ARCHITECTURES = ["LlamaForCausalLM", "GPT2LMHeadModel", "Phi3ForCausalLM"]


def attached(architecture):
    """A model in float64 with factors that are not zero, and the importances of two tasks."""
    model = families.model(architecture)
    generator = torch.Generator().manual_seed(1)
    past = [
        Importance(
            {
                name: torch.randn(model.get_parameter(name).shape, generator=generator)
                for name in attributed_linears(model)
            }
        )
        for _ in range(2)
    ]
    peft_model = adapter.attach(model, rank=3, alpha=6.0, seed=0).to(torch.float64)
    for name, p in peft_model.named_parameters():
        if ".lora_" in name:
            p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return peft_model, past


def factors(peft_model):
    return {n: p for n, p in peft_model.named_parameters() if ".lora_" in n}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_value_and_gradient_equal_those_of_the_quadratic_form(architecture):
    peft_model, past = attached(architecture)
    parameters, total = factors(peft_model), torch.zeros((), dtype=torch.float64)
    for name in past[0].entries:
        layer = "base_model.model." + name.removesuffix("weight")
        a, b = (parameters[f"{layer}lora_{factor}.default.weight"] for factor in "AB")
        for each in past:
            fisher = each.entries[name].double().clamp(min=0)
            update = 2.0 * (b @ a)
            update = update.T if architecture.startswith("GPT2") else update
            total = total + 0.5 * 3.0 * (fisher * update**2).sum()
    expected = torch.autograd.grad(total, list(parameters.values()))
    first = next(iter(parameters.values()))
    first.grad = torch.ones_like(first)
    penalise = lora.product_penalty(peft_model, past, strength=3.0)
    torch.testing.assert_close(penalise(), total.detach(), rtol=1e-9, atol=0)
    for p, gradient in zip(parameters.values(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient + 1 if p is first else gradient)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_is_ewc_of_the_merged_weights_anchored_where_the_adapter_starts(architecture):
    peft_model, past = attached(architecture)
    value = lora.product_penalty(peft_model, past, strength=3.0)()
    base = families.model(architecture)
    penalise = quadratic_penalty(dict(base.named_parameters()), past, strength=3.0)
    merged = adapter.merged(peft_model)
    with torch.no_grad():
        for name, p in base.named_parameters():
            p.copy_(merged.get_parameter(name))
    torch.testing.assert_close(value, penalise().to(value.dtype), rtol=1e-5, atol=0)
    assert value > 1


def test_what_it_cannot_penalise_is_refused():
    peft_model, past = attached("LlamaForCausalLM")
    with pytest.raises(ValueError, match="strength must be at least 0, not -1"):
        lora.product_penalty(peft_model, past, strength=-1)
    for bad in ([], [*past, Importance({})]):
        with pytest.raises(ValueError, match="needs at least one importance"):
            lora.product_penalty(peft_model, bad, strength=1)
    few = dict(list(past[0].entries.items())[1:])
    with pytest.raises(ValueError, match="of other weights than those with an adapter"):
        lora.product_penalty(peft_model, [Importance(few)], strength=1)
