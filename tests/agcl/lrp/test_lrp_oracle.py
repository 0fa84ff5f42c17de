"""The package's relevance against the explicit, slow LRP in tests/reference."""

import pytest
import torch
from reference import tiny
from reference.explicit_lrp import explain

from agcl.attribution import attribute
from agcl.lrp import attributed_linears
from agcl.tasks.batches import collate

RULES = ["attnlrp", "cp"]


def answer_logits(model, row):
    logits = model(torch.tensor([row.input_ids]), use_cache=False).logits[0]
    places = range(row.prompt_tokens, len(row.input_ids))
    return sum(logits[t - 1, row.input_ids[t]] for t in places)


def weight_relevance(model, row, rules):
    """W ⊙ (gᵀx) of every linear layer, from captured inputs and output gradients."""
    inputs, outputs = {}, {}
    linears = attributed_linears(model)

    def keep(name):
        def hook(module, args, output):
            output.retain_grad()
            inputs[name], outputs[name] = args[0], output

        return hook

    with tiny.explained(model, rules) as input_relevance:
        handles = [m.register_forward_hook(keep(n)) for n, m in linears.items()]
        answer_logits(model, row).backward()
        for handle in handles:
            handle.remove()
    found = {}
    for name, module in linears.items():
        gradient = outputs[name].grad
        if gradient is None:
            gradient = torch.zeros_like(outputs[name])
        found[name] = module.weight * (gradient[0].T @ inputs[name][0])
    return input_relevance()[0], found


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_relevance_of_tokens_and_weights_equals_the_explicit_lrp(attention, kv_heads, rules):
    model = tiny.with_exact_norms(
        tiny.llama(dtype=torch.float64, kv_heads=kv_heads, attention=attention)
    )
    # Eager attention computes its softmax in float32.
    close = {"rtol": 1e-8, "atol": 1e-9} if attention == "sdpa" else {"rtol": 1e-4, "atol": 1e-5}
    row = tiny.answered_rows(model, 3)[2]
    expected = explain(model, row, rules)

    tokens, weights = weight_relevance(model, row, rules)

    torch.testing.assert_close(tokens, expected.tokens, **close)
    assert weights.keys() == expected.weights.keys() - {"lm_head.weight"}
    for name, relevance in weights.items():
        torch.testing.assert_close(relevance, expected.weights[name], **close, msg=name)


def test_explicit_lrp_runs_the_same_model(exact_llama):
    row = tiny.answered_rows(exact_llama, 2)[1]
    with torch.no_grad():
        assert explain(exact_llama, row).target == pytest.approx(
            float(answer_logits(exact_llama, row)), rel=1e-10
        )


@pytest.mark.parametrize("rules", RULES)
def test_attribution_of_one_row_equals_the_explicit_lrp_per_unit_of_flow(exact_llama, rules):
    row = tiny.answered_rows(exact_llama, 3)[2]
    expected = explain(exact_llama, row, rules)

    importance = attribute(exact_llama, [collate([row])], top_k=1, rules=rules)

    for name, entries in importance.entries.items():
        flow = expected.outputs[name].abs().sum()
        relevance = expected.weights[name] / flow if flow else torch.zeros_like(entries)
        torch.testing.assert_close(entries, relevance, rtol=1e-5, atol=1e-8, msg=name)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_cp_conserves_the_target_down_to_the_input_tokens(attention, kv_heads):
    model = tiny.llama(dtype=torch.float64, kv_heads=kv_heads, attention=attention, layers=3)
    for row in tiny.answered_rows(model, 4):
        with tiny.explained(model, "cp") as input_relevance:
            target = answer_logits(model, row)
            target.backward()
        assert input_relevance().sum().item() == pytest.approx(target.item(), rel=1e-5)


@pytest.mark.parametrize("rules", RULES)
def test_weight_relevance_sums_to_the_relevance_at_the_output(exact_llama, rules):
    row = tiny.answered_rows(exact_llama, 3)[2]
    arriving = {}

    def keep(name):
        def hook(module, args, output):
            arriving[name] = torch.zeros(2, dtype=torch.float64)  # sum of z·g, sum of |z·g|

            def note(gradient):
                flow = output.detach() * gradient
                arriving[name] += torch.stack([flow.sum(), flow.abs().sum()])

            output.register_hook(note)

        return hook

    handles = [
        module.register_forward_hook(keep(name))
        for name, module in attributed_linears(exact_llama).items()
    ]
    importance = attribute(exact_llama, [collate([row])], top_k=None, rules=rules)
    for handle in handles:
        handle.remove()

    for name, entries in importance.entries.items():
        total, flow = arriving[name].tolist()
        expected = total / flow if flow else 0.0
        assert float(entries.double().sum()) == pytest.approx(expected, abs=1e-5), name
