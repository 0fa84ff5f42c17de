"""The training loop: what it minimizes, and what its result must not depend on."""

import copy
import math

import pytest
import torch
from reference import tiny
from torch.nn.functional import cross_entropy

import agcl.train as train_module
from agcl import throughput
from agcl.model.forward import activation_checkpointing
from agcl.modulation import GatedAdamW
from agcl.scoring.evaluate import predict, text_loss
from agcl.scoring.generate import generate
from agcl.tasks import Encoded
from agcl.tasks.batches import micro_batches
from agcl.train import NonFiniteLoss, train_task

OPTIONS = {"epochs": 2, "batch_size": 4, "micro_batch_size": 4, "seed": 0}


def train(model, rows, *, learning_rate=1e-2, optimizer=None, **options):
    """Train in place; return (metrics, step) for every step."""
    logged = []
    optimizer = optimizer or GatedAdamW(model.named_parameters(), lr=learning_rate)
    train_task(
        model,
        rows,
        optimizer,
        log=lambda metrics, step: logged.append((metrics, step)),
        **{**OPTIONS, **options},
    )
    return logged


def losses(logged):
    return [metrics["loss"] for metrics, _ in logged]


@torch.no_grad()
def answer_loss(model, rows):
    """Mean cross-entropy of the answer tokens, computed row by row and token by token."""
    values = []
    for ids, prompt_tokens, _ in rows:
        logits = model(torch.tensor([ids]), use_cache=False).logits[0]
        values += [
            float(cross_entropy(logits[t - 1], torch.tensor(ids[t])))
            for t in range(prompt_tokens, len(ids))
        ]
    return sum(values) / len(values)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_the_loss_is_the_mean_over_answer_tokens_and_falls(llama):
    rows = tiny.random_rows(6)
    expected = answer_loss(llama, rows)
    logged = train(llama, rows, epochs=30, batch_size=6)
    assert losses(logged)[0] == pytest.approx(expected, rel=1e-5)
    assert answer_loss(llama, rows) < 0.2 * expected


def test_one_step_equals_plain_sgd_on_that_loss_with_clipping(llama):
    rows = tiny.random_rows(5)
    plain = copy.deepcopy(llama)
    total = torch.zeros(())
    for ids, prompt_tokens, _ in rows:
        logits = plain(torch.tensor([ids]), use_cache=False).logits[0, prompt_tokens - 1 : -1]
        total = total + cross_entropy(logits, torch.tensor(ids[prompt_tokens:]), reduction="sum")
    answer_tokens = sum(len(ids) - prompt for ids, prompt, _ in rows)
    (total / answer_tokens).backward()
    norm = torch.stack([p.grad.norm() for p in plain.parameters()]).norm()
    limit = float(norm) / 3

    [(metrics, step)] = train(
        llama,
        rows,
        optimizer=torch.optim.SGD(llama.parameters(), lr=0.1),
        epochs=1,
        batch_size=5,
        micro_batch_size=2,
        max_gradient_norm=limit,
    )

    assert step == 1
    assert metrics["gradient_norm"] == pytest.approx(float(norm), rel=1e-4)
    for (name, trained), p in zip(llama.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(trained, p - 0.1 * p.grad / 3, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("micro_batch_size", [1, 3, 100])
def test_the_result_does_not_depend_on_the_micro_batch_size(micro_batch_size):
    rows = tiny.random_rows(10)
    whole, cut = (tiny.llama(dtype=torch.float64) for _ in range(2))
    first = train(whole, rows, micro_batch_size=4)
    second = train(cut, rows, micro_batch_size=micro_batch_size)
    assert losses(second) == pytest.approx(losses(first), rel=1e-5)
    for name, weight in weights(whole).items():
        torch.testing.assert_close(weights(cut)[name], weight, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("packing", [False, True])
def test_micro_batches_by_tokens_train_alike_and_stay_below_the_maximum(monkeypatch, packing):
    rows = tiny.random_rows(10)
    whole, cut = (tiny.llama(dtype=torch.float64) for _ in range(2))
    first = train(whole, rows, batch_size=10, micro_batch_size=None)
    sizes = []
    make = train_module.pack if packing else train_module.collate

    def seen(piece):
        batch = make(piece)
        sizes.append(batch.input_ids.numel())
        return batch

    monkeypatch.setattr(train_module, "pack" if packing else "collate", seen)
    longest = max(len(row.input_ids) for row in rows)
    options = {"batch_size": 10, "micro_batch_size": None, "packing": packing}
    second = train(cut, rows, max_tokens=2 * longest, **options)
    assert len(sizes) > 2 * len(second)
    assert max(sizes) <= 2 * longest
    assert losses(second) == pytest.approx(losses(first), rel=1e-5)


def test_a_row_longer_than_the_maximum_is_alone():
    assert micro_batches([9, 2, 3, 2], max_tokens=6) == [[1, 3], [2], [0]]
    assert micro_batches([9, 2, 3, 2], max_tokens=7, packing=True) == [[1, 3, 2], [0]]
    assert micro_batches([3, 1, 2], max_rows=2) == [[1, 2], [0]]
    assert micro_batches([3, 1, 2]) == [[1, 2, 0]]


def test_every_step_has_its_speed_and_memory(llama):
    rows = tiny.random_rows(6)
    logged = train(llama, rows, measure=throughput.meter(llama))
    for metrics, _ in logged:
        assert metrics["tokens_per_second"] > 0
        assert 0.05 < metrics["peak_memory_gb"] < 100
        assert "mfu" not in metrics  # A CPU's peak is not known.


def test_utilization_counts_the_arithmetic_of_trained_and_frozen_weights(llama, monkeypatch):
    """Against a count by hand, of a device that does 1 TFLOP/s."""
    monkeypatch.setattr(throughput, "_peak", lambda name: 1e12)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Toy")
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5 * 10**9)
    monkeypatch.setattr(type(llama), "device", torch.device("cuda"))
    clock = iter([10.0, 12.0])
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(clock))
    llama.model.layers[0].requires_grad_(False)
    found = throughput.meter(llama)([3, 5])
    layers = [sum(p.numel() for p in layer.parameters()) for layer in llama.model.layers]
    norm = llama.model.norm.weight.numel()
    weights = 4 * layers[0] + 6 * (sum(layers[1:]) + norm)
    width = llama.config.hidden_size * llama.config.num_hidden_layers
    flops = weights * 8 + 12 * width * (9 + 25)
    assert found["tokens_per_second"] == 4.0
    assert found["peak_memory_gb"] == 5.0
    assert found["mfu"] == pytest.approx(flops / 2e12, abs=1e-4)


@pytest.mark.parametrize("micro_batch_size", [1, 3, 100])
def test_packed_and_padded_rows_train_alike(micro_batch_size):
    rows = tiny.random_rows(10)
    padded, packed = (tiny.llama(dtype=torch.float64) for _ in range(2))
    first = train(padded, rows)
    second = train(packed, rows, packing=True, micro_batch_size=micro_batch_size)
    for key in ("loss", "gradient_norm"):
        expected = [metrics[key] for metrics, _ in first]
        assert [metrics[key] for metrics, _ in second] == pytest.approx(expected, rel=1e-5)
    for name, weight in weights(padded).items():
        torch.testing.assert_close(weights(packed)[name], weight, rtol=1e-4, atol=1e-5, msg=name)


def test_a_smaller_last_batch_is_a_step_over_the_remaining_rows(llama):
    rows = tiny.random_rows(10)
    logged = train(llama, rows, epochs=3, batch_size=4)
    assert [step for _, step in logged] == list(range(1, 10))
    assert {metrics["of_steps"] for metrics, _ in logged} == {9}


def test_every_row_is_seen_once_per_epoch(llama):
    """With a learning rate of zero an epoch's losses average to the loss over all rows."""
    rows = tiny.random_rows(10)
    rows = [Encoded(row.input_ids, len(row.input_ids) - 2) for row in rows]
    optimizer = torch.optim.SGD(llama.parameters(), lr=0.0)
    logged = train(llama, rows, optimizer=optimizer, epochs=2, batch_size=4)
    for epoch in (logged[:3], logged[3:]):
        mean = sum(n * loss for n, loss in zip((4, 4, 2), losses(epoch), strict=True)) / 10
        assert mean == pytest.approx(answer_loss(llama, rows), rel=1e-5)
    assert losses(logged[:3]) != losses(logged[3:])


def test_the_same_seed_gives_the_same_bits_and_another_seed_another_order():
    rows = tiny.random_rows(10)
    models = [tiny.llama() for _ in range(3)]
    logged = []
    for model, seed, noise in zip(models, (7, 7, 8), (1, 2, 3), strict=True):
        torch.manual_seed(noise)
        logged.append(train(model, rows, seed=seed))
    assert logged[0] == logged[1]
    assert losses(logged[0])[0] != losses(logged[2])[0]
    for name, weight in weights(models[0]).items():
        assert torch.equal(weights(models[1])[name], weight), name


def test_dropout_is_on_and_drawn_from_the_seed():
    rows = tiny.random_rows(6)
    models = [tiny.llama(dropout=dropout) for dropout in (0.5, 0.5, 0.0)]
    logged = [losses(train(model, rows)) for model in models]
    assert logged[0] == logged[1]
    assert logged[0] != logged[2]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_loss_stops_before_the_step(llama, value):
    llama.lm_head.weight.data[3, 3] = value
    before = weights(llama)
    with pytest.raises(NonFiniteLoss, match="step 1 of 6"):
        train(llama, tiny.random_rows(10))
    for name, weight in weights(llama).items():
        torch.testing.assert_close(weight, before[name], rtol=0, atol=0, equal_nan=True, msg=name)


def test_frozen_weights_and_closed_gates_keep_their_bits(llama):
    frozen, gated = (f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1))
    llama.get_parameter(frozen).requires_grad_(False)
    before = weights(llama)
    named = [(name, p) for name, p in llama.named_parameters() if p.requires_grad]
    gate = {gated: torch.zeros_like(before[gated])}
    train(llama, tiny.random_rows(4), optimizer=GatedAdamW(named, gate=gate, lr=1e-2))
    for name, weight in weights(llama).items():
        assert torch.equal(weight, before[name]) == (name in (frozen, gated)), name
    assert all(p.grad is None for p in llama.parameters())


def test_bfloat16_keeps_float32_weights_and_trains(llama):
    rows = tiny.random_rows(6)
    logged = losses(train(llama, rows, epochs=20, batch_size=6, precision="bfloat16"))
    assert logged[-1] < 0.5 * logged[0]
    assert all(p.dtype == torch.float32 for p in llama.parameters())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_under_autocast_no_copy_of_a_weight_outlives_its_use(checkpointing):
    """A cache of copies would hold those of the whole model until the forward pass ends."""
    model, rows, cached = tiny.llama(), tiny.random_rows(4), []

    def look(module, args):
        cached.append(torch.is_autocast_cache_enabled())

    with model.model.layers[0].mlp.register_forward_pre_hook(look):
        with activation_checkpointing(model, checkpointing):
            train(model, rows, epochs=1, precision="bfloat16")
        in_training = len(cached)
        predict(model, rows, batch_size=4, precision="bfloat16")
        text_loss(model, rows[0].input_ids, precision="bfloat16")
        assert len(cached) > in_training >= 1 + checkpointing
        assert not any(cached)
        generate(model, [[3, 4]], end=0, max_new_tokens=2, batch_size=1, precision="bfloat16")
        assert cached[-1], "decoding would copy every weight again for every token"
