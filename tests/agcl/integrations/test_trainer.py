"""Protection in a Trainer: equal to agcl's own training, whatever the optimizer."""

import copy

import pytest
import torch
from reference import tiny
from reference import workers as remote
from reference.trainers import ROWS, arguments, basis_of, gate_of, leak, trainer, weights
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from agcl.integrations import transformers as integration
from agcl.integrations.transformers import Protect, freeze_others, gated_adamw
from agcl.lrp import attributed_linears, stored_transposed
from agcl.modulation import GatedAdamW
from agcl.train import train_task

UP = "model.layers.0.mlp.up_proj.weight"


def groups(model):
    """A Trainer decays no norms."""
    named = list(model.named_parameters())
    return [
        {"params": [each for each in named if ("norm" in each[0]) == is_norm], "weight_decay": by}
        for is_norm, by in ((False, 0.1), (True, 0.0))
    ]


def assert_close(found, expected, atol):
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize("kinds", [("basis",), ("gate",), ("gate", "basis")])
def test_callback_and_optimizer_equal_agcls_own_training(tmp_path, kinds):
    """With accumulation, clipping, weight decay and a schedule, on the same rows in order.

    The two Trainers agree bit for bit. agcl's loop pads and sums the loss in another order.
    """
    start = tiny.llama()
    protection = {"basis": basis_of(start), "gate": gate_of(start)}
    protection = {kind: protection[kind] for kind in kinds}
    own, called, given = (copy.deepcopy(start) for _ in range(3))
    trainer(called, tmp_path, callbacks=[Protect(**protection)]).train()
    trainer(given, tmp_path, protected=protection).train()
    assert_close(weights(given), weights(called), atol=0)
    train_task(
        own, ROWS, GatedAdamW(groups(own), lr=1e-2, **protection), epochs=2, batch_size=8,
        micro_batch_size=4, seed=0, schedule="linear",
    )  # fmt: skip
    moved = (weights(own)[UP] - weights(start)[UP]).abs().max()
    assert moved > 5e-3
    assert_close(weights(called), weights(own), atol=2e-5)


def test_a_gate_on_the_gradient_equals_agcls_own(tmp_path):
    gate = gate_of(tiny.llama())
    given, plain = tiny.llama(), tiny.llama()
    trainer(given, tmp_path, protected={"gate": gate, "on": "gradient"}).train()
    optimizer = GatedAdamW(groups(plain), lr=1e-2, gate=gate, on="gradient")
    trainer(plain, tmp_path, optimizers=(optimizer, None)).train()
    assert_close(weights(given), weights(plain), atol=0)


@pytest.mark.parametrize("kind", ["gate", "basis"])
@pytest.mark.parametrize("way", ["callback", "optimizer"])
def test_without_strength_it_is_a_plain_trainer_bit_for_bit(tmp_path, kind, way):
    protected, plain = tiny.llama(), tiny.llama()
    linears = attributed_linears(plain).items()
    protection = {
        "gate": {n: torch.ones_like(layer.weight) for n, layer in linears},
        "basis": {n: torch.zeros(layer.weight.shape[1], 0) for n, layer in linears},
    }
    chosen = {kind: protection[kind]}
    options = {"callbacks": [Protect(**chosen)]} if way == "callback" else {"protected": chosen}
    trainer(protected, tmp_path, **options).train()
    trainer(plain, tmp_path).train()
    assert_close(weights(protected), weights(plain), atol=0)


def test_a_closed_gate_keeps_every_bit(tmp_path):
    model = tiny.llama()
    before = weights(model)
    gate = {UP: torch.zeros_like(before[UP])}
    trainer(model, tmp_path, callbacks=[Protect(gate=gate)]).train()
    assert torch.equal(weights(model)[UP], before[UP])
    other = UP.replace("up_proj", "gate_proj")
    assert not torch.equal(weights(model)[other], before[other])


def momentum(model):
    return torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, weight_decay=0.1)


@pytest.mark.parametrize("optim", ["adafactor", "rmsprop", "adagrad", momentum])
def test_any_optimizer_leaves_protected_directions(tmp_path, optim):
    model = tiny.llama()
    before, basis = weights(model), basis_of(model)
    options = {"optim": optim}
    if callable(optim):
        options = {"optimizers": (optim(model), None)}
    trainer(model, tmp_path, callbacks=[Protect(basis=basis)], **options).train()
    assert leak(before, weights(model), basis) < 1e-4
    free = tiny.llama()
    if callable(optim):
        options = {"optimizers": (optim(free), None)}
    trainer(free, tmp_path, **options).train()
    assert leak(before, weights(free), basis) > 0.2


def test_weights_stored_transposed_are_projected_on_the_right_side(tmp_path):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=4, n_positions=32,
                   bos_token_id=1, eos_token_id=1)
    )  # fmt: skip
    given = copy.deepcopy(model)
    before, basis = weights(model), basis_of(model)
    trainer(model, tmp_path, callbacks=[Protect(basis=basis)]).train()
    trainer(given, tmp_path, protected={"basis": basis}).train()
    assert leak(before, weights(model), basis, stored_transposed(model)) < 1e-4
    assert leak(before, weights(given), basis, stored_transposed(model)) < 1e-4


def test_under_bf16_autocast_float32_weights_are_protected(tmp_path):
    model = tiny.llama()
    before, basis = weights(model), basis_of(model)
    trainer(model, tmp_path, callbacks=[Protect(basis=basis)], bf16=True).train()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert leak(before, weights(model), basis) < 1e-4


def test_a_compiled_models_weights_are_found(tmp_path):
    model = tiny.llama()
    before, basis = weights(model), basis_of(model)
    compiled = torch.compile(model, backend="eager")
    callback = Protect(basis=basis)
    callback.on_train_begin(arguments(tmp_path), None, None, model=nn.DataParallel(compiled))
    optimizer = momentum(model)
    ids = torch.arange(2, 9).unsqueeze(0)
    model(ids, labels=ids).loss.backward()
    callback.on_pre_optimizer_step(None, None, None)
    held = sum(copy.numel() for _, before in callback._before for copy in before)
    assert held == sum(model.get_parameter(name).numel() for name in basis)
    optimizer.step()
    callback.on_optimizer_step(None, None, None)
    assert leak(before, weights(model), basis) < 1e-4
    assert not callback._before  # Copies are held for the step only.


def test_others_are_frozen_and_the_rest_is_named_in_a_warning(tmp_path, caplog):
    model = tiny.llama()
    before, basis = weights(model), basis_of(model)
    trainer(model, tmp_path, callbacks=[Protect(basis=basis)], max_steps=1).train()
    assert "7 trained parameters are not protected" in caplog.text
    caplog.clear()
    model = tiny.llama()
    freeze_others(model, basis)
    trainer(model, tmp_path, callbacks=[Protect(basis=basis)], max_steps=1).train()
    assert "not protected" not in caplog.text
    after = weights(model)
    moved = {name for name in before if not torch.equal(after[name], before[name])}
    assert moved == set(basis)


@pytest.mark.parametrize("way", ["callback", "optimizer"])
def test_a_resumed_run_gives_the_same_bits(tmp_path, way):
    basis = basis_of(tiny.llama())

    def run(stop=None, **options):
        model = tiny.llama()
        protection = {"protected": {"basis": basis}}
        if way == "callback":
            protection = {"callbacks": [Protect(basis=basis)]}
        made = trainer(
            model, tmp_path / "run", save_strategy="steps", save_steps=2, max_steps=4, **protection
        )
        made.train(**options)
        return weights(model)

    whole = run()
    resumed = run(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert_close(resumed, whole, atol=0)


def refused(model, folder, **options):
    callback = Protect(**{"basis": basis_of(tiny.llama()), **options})
    with pytest.raises(ValueError) as error:  # noqa: PT011
        trainer(model, folder, callbacks=[callback]).train()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_cannot_hold_is_refused_before_the_first_step(tmp_path, monkeypatch):
    assert UP in refused(tiny.llama(dtype=torch.bfloat16), tmp_path, basis={UP: torch.eye(16)})
    assert "9 inputs" in refused(tiny.llama(), tmp_path, basis={UP: torch.eye(9)})
    other = UP.replace("0", "7")
    assert f"no parameter {other}" in refused(tiny.llama(), tmp_path, basis={other: torch.eye(16)})
    frozen = tiny.llama()
    frozen.get_parameter(UP).requires_grad_(False)
    assert "is trained" in refused(frozen, tmp_path, basis={UP: torch.eye(16)})
    with pytest.raises(ValueError, match="pass a basis"):
        Protect()
    with pytest.raises(ValueError, match="pass a basis"):
        gated_adamw(arguments(tmp_path))

    class ScheduleFree(torch.optim.SGD):
        def train(self):
            pass

    model = tiny.llama()
    made = trainer(
        model, tmp_path, callbacks=[Protect(basis=basis_of(model))],
        optimizers=(ScheduleFree(model.parameters()), None),
    )  # fmt: skip
    with pytest.raises(ValueError, match="ScheduleFree swaps"):
        made.train()
    args = arguments(tmp_path)
    for name in ("FSDP", "DeepSpeed"):
        with monkeypatch.context() as launched:
            launched.setenv(f"ACCELERATE_USE_{name.upper()}", "true")
            with pytest.raises(ValueError, match=f"^{name} shards"):
                integration._refuse(args, None)


@pytest.mark.parametrize("way", ["callback", "optimizer"])
def test_two_data_parallel_processes_equal_one(tmp_path, workers, way):
    """Each takes every second micro-batch; one process accumulates both."""
    (kind, one), (_, two) = workers.run(remote.trained_by_a_trainer, way, tmp_path)
    assert kind == "DistributedDataParallel"
    assert_close(one, two, atol=0)
    start, model = weights(tiny.llama()), tiny.llama()
    basis = basis_of(model)
    trainer(model, tmp_path, callbacks=[Protect(basis=basis)]).train()
    assert_close(one, weights(model), atol=2e-5)
    assert leak(start, one, basis) < 1e-4
