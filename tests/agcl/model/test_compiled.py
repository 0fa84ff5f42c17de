"""Training through torch.compile: same numbers, and no trace of it afterwards."""

from itertools import chain

import pytest
import torch
from reference import families, tiny

from agcl.errors import InputError
from agcl.loss import summed_loss
from agcl.model.forward import activation_checkpointing, autocast, compiled
from agcl.tasks.batches import collate, pack

BATCHES = [tiny.random_rows(5), tiny.random_rows(3, seed=1), tiny.random_rows(4, seed=2)]


def loss_and_gradients(model, batch, precision="float32"):
    torch.manual_seed(0)
    with autocast(model.device, precision):
        loss = summed_loss(model, batch)
    return [loss, *torch.autograd.grad(loss, list(model.parameters()))]


def training(architecture):
    model = families.model(architecture, dtype=torch.float32).train()
    # Compiled dropout draws other random numbers than eager dropout.
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def check_same(model, batching, backend, *, checkpointing=False, precision="float32"):
    tolerance = 1e-4 if precision == "float32" else 3e-2
    batches = [batching(rows) for rows in BATCHES]
    with activation_checkpointing(model, checkpointing):
        expected = [loss_and_gradients(model, batch, precision) for batch in batches]
        with compiled(model, backend=backend):
            found = [loss_and_gradients(model, batch, precision) for batch in batches]
    for one, other in zip(chain(*found), chain(*expected), strict=True):
        size = float(other.detach().abs().max())
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * max(size, 1e-3))


def counting(calls):
    def backend(graph, inputs):
        calls.append(len(inputs))
        return graph.forward

    return backend


@pytest.mark.parametrize("batching", [collate, pack])
def test_layers_share_one_compilation_and_compute_the_same(batching):
    torch.compiler.reset()
    graphs = []
    check_same(training("LlamaForCausalLM"), batching, counting(graphs))
    assert 1 <= len(graphs) <= 3


def test_the_model_is_restored_even_after_an_error_that_names_what_is_missing():
    torch.compiler.reset()
    model, batch = training("LlamaForCausalLM"), collate(BATCHES[0])
    names, layers = [*model.state_dict()], [*model.model.layers]

    def broken(graph, inputs):
        raise RuntimeError("no compiler")

    def train_compiled():
        with compiled(model, backend=broken):
            assert [*model.state_dict()] == names
            loss_and_gradients(model, batch)

    expected = loss_and_gradients(model, batch)
    with pytest.raises(InputError, match=r"^torch.compile failed.*C\+\+.*no compiler"):
        train_compiled()
    assert all(layer._compiled_call_impl is None for layer in layers)
    assert [*model.model.layers] == layers
    for one, other in zip(loss_and_gradients(model, batch), expected, strict=True):
        assert torch.equal(one, other)


def test_switched_off_it_does_nothing():
    model = training("LlamaForCausalLM")
    with compiled(model, False):
        assert all(layer._compiled_call_impl is None for layer in model.model.layers)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("batching", "precision", "checkpointing"),
    [(collate, "float32", False), (pack, "bfloat16", True)],
)
def test_inductor_works_with_all_settings(batching, precision, checkpointing):
    torch.compiler.reset()
    check_same(
        training("LlamaForCausalLM"),
        batching,
        "inductor",
        checkpointing=checkpointing,
        precision=precision,
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("architecture", families.CONFIGS)
def test_every_family_compiles(architecture):
    torch.compiler.reset()
    check_same(training(architecture), collate, "aot_eager", checkpointing=True)
