"""Every supported model family: relevance conserved, forward unchanged, state restored."""

import pytest
import torch
from reference import families
from torch import nn
from transformers.pytorch_utils import Conv1D

from agcl.attribution import attribute
from agcl.importance import Importance
from agcl.lrp import FAMILIES, attributed_linears, relevance_backward, stored_transposed, weight_of
from agcl.model.builtin import builtin_tokenizer
from agcl.model.check import check_folder
from agcl.model.models import load_model, save
from agcl.modulation import GatedAdamW, bases
from agcl.modulation.checks import check
from agcl.tasks import Encoded
from agcl.tasks.batches import collate

IDS = torch.arange(2, 20).view(2, 9)
every_family = pytest.mark.parametrize("architecture", FAMILIES)


def logits_of(model):
    return model(IDS, use_cache=False).logits


def first_block(model):
    name = next(iter(attributed_linears(model))).split(".0.")[0]
    return model.get_submodule(f"{name}.0")


def test_every_family_of_the_table_is_tested():
    assert families.CONFIGS.keys() == FAMILIES.keys()


@every_family
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_forward_is_unchanged_and_everything_restored(architecture, attention):
    if architecture == "Gemma2ForCausalLM":
        attention = "eager"  # The only one in transformers with soft capping.
    model = families.model(architecture, dtype=torch.float32, attention=attention)
    model.train()
    before = [(n, m.training) for n, m in model.named_modules()]
    model.eval()
    with torch.no_grad():
        outside = logits_of(model)
    model.train()
    for rules in ("attnlrp", "cp"):
        with relevance_backward(model, rules):
            assert torch.equal(logits_of(model).detach(), outside)
        with pytest.raises(KeyError), relevance_backward(model, rules):
            raise KeyError
    assert [(n, m.training) for n, m in model.named_modules()] == before
    assert all(p.requires_grad for p in model.parameters())
    assert model.config._attn_implementation == attention
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    model.eval()
    with torch.no_grad():
        assert torch.equal(logits_of(model), outside)


@every_family
def test_cp_conserves_relevance_from_the_logit_to_the_first_block(architecture):
    model = families.without_biases(families.model(architecture))
    seen = []

    def keep(tensor):
        tensor.retain_grad()
        seen.append(tensor)

    head = model.get_output_embeddings()
    with relevance_backward(model, "cp"):
        handles = [
            first_block(model).register_forward_pre_hook(lambda module, args: keep(args[0])),
            head.register_forward_hook(lambda module, args, output: keep(output)),
        ]
        logits_of(model)[:, -1, 7].sum().backward()
        for handle in handles:
            handle.remove()
    hidden, logits = seen
    # Gemma 2 soft-caps its logits after the head; relevance is that of the uncapped logits.
    expected = (logits * logits.grad).sum((1, 2))
    assert expected.abs().min() > 1e-3
    torch.testing.assert_close((hidden * hidden.grad).sum((1, 2)), expected, rtol=2e-5, atol=1e-6)


@every_family
@pytest.mark.parametrize("rules", ["attnlrp", "cp"])
def test_a_weights_relevance_equals_that_of_its_layers_output(architecture, rules):
    model = families.without_biases(families.model(architecture))
    linears = attributed_linears(model)
    with relevance_backward(model, rules), families.flow(linears) as seen:
        logits_of(model)[:, -1, 7].sum().backward()
    if rules == "attnlrp":
        assert seen.keys() == linears.keys()
    for name, (x, z, g) in seen.items():
        relevance = weight_of(linears[name]) * (g.flatten(0, 1).T @ x.flatten(0, 1))
        torch.testing.assert_close(relevance.sum(), (z * g).sum(), msg=name)


@every_family
def test_every_linear_layer_of_a_block_is_covered(architecture):
    model = families.model(architecture)
    parameters = dict(model.named_parameters())
    linears = attributed_linears(model)
    inside = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not model.get_output_embeddings()
    }
    assert linears.keys() == inside
    for name, module in linears.items():
        assert parameters[name] is module.weight
    assert len(linears) % 2 == 0


@every_family
def test_attribution_has_the_shapes_of_the_weights_and_projection_keeps_old_outputs(architecture):
    model = families.model(architecture, dtype=torch.float32)
    rows = [Encoded([(3 * i + j) % 38 + 2 for j in range(6)], 3) for i in range(4)]
    batches = [collate(rows[:3]), collate(rows[3:])]
    importance = attribute(model, batches, top_k=2, moments="uniform", correct_only=False)
    parameters = dict(model.named_parameters())
    linears = attributed_linears(model)
    inputs = {}
    for name, entries in importance.entries.items():
        assert entries.shape == parameters[name].shape
        inputs[name] = weight_of(linears[name]).shape[1]
        assert len(importance.moments[importance.input_of(name)].directions) == inputs[name]
    basis = bases([importance], energy=0.9)
    transposed = stored_transposed(model)
    assert bool(transposed) == (architecture == "GPT2LMHeadModel")
    trained = {n: p for n, p in parameters.items() if n in linears}
    before = {n: p.detach().clone() for n, p in trained.items()}
    optimizer = GatedAdamW(trained.items(), basis=basis, transposed=transposed, lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for parameter in trained.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    for name, layer in linears.items():
        change = weight_of(layer) - (before[name].T if name in transposed else before[name])
        kept = (change @ basis[name]).norm() / change.norm()
        assert change.norm() > 0
        assert kept < 1e-4, name
    after = {n: p.detach() for n, p in trained.items()}
    measured = check(
        before, after, gate=None, on="update", basis=basis, steps=1, transposed=transposed
    )
    assert measured["projection_leak"] < 1e-3


@every_family
def test_top_k_attribution_equals_one_row_at_a_time(architecture):
    model = families.model(architecture)
    rows = [Encoded([(5 * i + j) % 38 + 2 for j in range(5 + i)], 3) for i in range(3)]
    together = attribute(model, [collate(rows)], top_k=2, correct_only=False)
    one_by_one = [attribute(model, [collate([r])], top_k=1, correct_only=False) for r in rows]
    for name, entries in together.entries.items():
        stacked = torch.stack([each.entries[name] for each in one_by_one])
        torch.testing.assert_close(entries, stacked.topk(2, dim=0).values.mean(0), msg=name)


@every_family
def test_a_saved_model_is_accepted_and_loads(architecture, tmp_path):
    tokenizer = builtin_tokenizer(["some text"])
    model = families.model(architecture, dtype=torch.float32, vocab_size=len(tokenizer))
    save(model, tokenizer, tmp_path)
    assert check_folder(tmp_path).get_vocab().items() >= tokenizer.get_vocab().items()
    loaded = load_model(tmp_path)
    with torch.no_grad():
        expected = logits_of(model)
        assert torch.equal(logits_of(loaded.eval()), expected)
        # No dropout: its random numbers would depend on the number of ranks.
        assert torch.equal(logits_of(loaded.train()), expected)


def test_an_importance_keeps_the_orientation_of_its_weight_on_disk(tmp_path):
    model = families.model("GPT2LMHeadModel", dtype=torch.float32)
    rows = [Encoded([2, 3, 4, 5, 6], 3)]
    importance = attribute(model, [collate(rows)], top_k=1, correct_only=False)
    importance.save(tmp_path / "file")
    again = Importance.load(tmp_path / "file")
    name = "transformer.h.0.mlp.c_fc.weight"
    assert again.entries[name].shape == (16, 24)
    assert torch.equal(again.entries[name], importance.entries[name].bfloat16())
