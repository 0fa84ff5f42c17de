"""One rank or two: the same importance, training and verdicts."""

from types import SimpleNamespace

import pytest
import torch
from reference import tiny
from reference import workers as remote

from agcl.parallel import distributed, gradients

MODEL = {"seed": 0}


@pytest.mark.parametrize("rules", ["attnlrp", "cp"])
@pytest.mark.parametrize("top_k", [1, 4])
def test_top_k_importance_is_bit_identical_on_two_ranks(workers, llama, top_k, rules):
    rows = tiny.answered_rows(llama, 8, wrong=(3, 4))
    options = {"top_k": top_k, "rules": rules, "moments": "relevance"}
    entries, moments, header = remote.attribute_batches(rows, 3, MODEL, **options)
    for other in workers.run(remote.attribute_batches, rows, 3, MODEL, **options):
        assert other[2] == header
        for name, tensor in entries.items():
            assert torch.equal(other[0][name], tensor), name
        for name, tensor in moments.items():
            torch.testing.assert_close(other[1][name], tensor, rtol=1e-5, atol=1e-5, msg=name)


def test_importance_from_bfloat16_is_rounded_and_bit_identical_on_two_ranks(workers, llama):
    rows = tiny.answered_rows(llama, 8, wrong=(3, 4))
    options = {"top_k": 4, "running_values": "bfloat16"}
    entries, _, header = remote.attribute_batches(rows, 3, MODEL, **options)
    exact, _, _ = remote.attribute_batches(rows, 3, MODEL, top_k=4)
    assert header["running_values"] == "bfloat16"
    for name, tensor in exact.items():
        assert not torch.equal(entries[name], tensor), name
        assert (entries[name] - tensor).abs().max() < 2**-8 * tensor.abs().max(), name
    for other in workers.run(remote.attribute_batches, rows, 3, MODEL, **options):
        assert all(torch.equal(other[0][name], tensor) for name, tensor in entries.items())


@pytest.mark.parametrize("top_k", [2, None])
@pytest.mark.parametrize("moments", ["relevance", None])
def test_importance_is_bit_identical_when_two_ranks_split_the_layers(
    workers, llama, top_k, moments
):
    rows = tiny.answered_rows(llama, 8, wrong=(3, 4))
    options = {"top_k": top_k, "moments": moments, "split": "layers"}
    entries, alone, header = remote.attribute_batches(rows, 3, MODEL, **options)
    for other in workers.run(remote.attribute_batches, rows, 3, MODEL, **options):
        assert other[2] == header
        assert other[0].keys() == entries.keys()
        assert other[1].keys() == alone.keys()
        for name, tensor in entries.items():
            assert torch.equal(other[0][name], tensor), name
        for name, tensor in alone.items():
            assert torch.equal(other[1][name], tensor), name


@pytest.mark.parametrize("split", ["samples", "layers"])
def test_moments_without_entries_are_the_same_on_two_ranks(workers, llama, split):
    rows = tiny.answered_rows(llama, 8, wrong=(3, 4))
    options = {"moments": "relevance", "entries": False}
    entries, moments, header = remote.attribute_batches(rows, 3, MODEL, **options)
    assert entries == {}
    for other in workers.run(remote.attribute_batches, rows, 3, MODEL, split=split, **options):
        assert (other[0], other[2]) == ({}, header)
        for name, tensor in moments.items():
            torch.testing.assert_close(other[1][name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("rules", ["attnlrp", "cp"])
def test_mean_importance_is_the_same_on_two_ranks(workers, llama, rules):
    rows = tiny.answered_rows(llama, 8, wrong=(3, 4))
    options = {"top_k": None, "rules": rules, "moments": "uniform"}
    entries, moments, header = remote.attribute_batches(rows, 3, MODEL, **options)
    first, second = workers.run(remote.attribute_batches, rows, 3, MODEL, **options)
    for name, tensor in entries.items():
        torch.testing.assert_close(first[0][name], tensor, rtol=1e-5, atol=1e-8, msg=name)
        assert torch.equal(first[0][name], second[0][name]), name
    for name, tensor in moments.items():
        torch.testing.assert_close(first[1][name], tensor, rtol=1e-5, atol=1e-5, msg=name)
    assert first[2] == second[2] == header


@pytest.mark.parametrize("top_k", [4, None])
def test_a_rank_without_correct_rows_changes_nothing(workers, llama, top_k):
    rows = tiny.answered_rows(llama, 6, wrong=(3, 4, 5))
    options = {"top_k": top_k, "moments": "relevance"}
    entries, moments, _ = remote.attribute_batches(rows, 3, MODEL, **options)
    for other in workers.run(remote.attribute_batches, rows, 3, MODEL, **options):
        for name, tensor in entries.items():
            assert torch.equal(other[0][name], tensor), name
        for name, tensor in moments.items():
            torch.testing.assert_close(other[1][name], tensor, rtol=1e-5, atol=1e-5, msg=name)


def test_a_rank_without_rows_changes_nothing(workers, llama):
    rows = tiny.answered_rows(llama, 3)
    entries, _, header = remote.attribute_batches(rows, 3, MODEL, top_k=2)
    for other in workers.run(remote.attribute_batches, rows, 3, MODEL, top_k=2):
        assert other[2] == header
        assert all(torch.equal(other[0][name], tensor) for name, tensor in entries.items())


def test_no_correct_row_on_any_rank_is_an_error_on_all(workers, llama):
    rows = tiny.answered_rows(llama, 4, wrong=(0, 1, 2, 3))
    with pytest.raises(ValueError, match="none of the 4 rows"):
        workers.run(remote.attribute_batches, rows, 2, MODEL)


@pytest.mark.parametrize(("batch_size", "micro_batch_size"), [(6, 2), (4, 4)])
def test_training_is_the_same_on_two_ranks(workers, batch_size, micro_batch_size):
    """With 4 rows in one micro-batch the second rank has none; 10 rows leave a remainder."""
    rows = tiny.random_rows(10)
    options = {
        "epochs": 2,
        "batch_size": batch_size,
        "micro_batch_size": micro_batch_size,
        "seed": 3,
    }
    losses, weights = remote.train_rows(rows, MODEL, **options)
    first, second = workers.run(remote.train_rows, rows, MODEL, **options)
    assert first[0] == pytest.approx(losses, rel=1e-6)
    assert first[0] == second[0]
    for name, weight in weights.items():
        # Adam divides by the gradient's magnitude, so rounding errors in tiny gradients matter.
        torch.testing.assert_close(first[1][name], weight, rtol=1e-4, atol=1e-4, msg=name)
        assert torch.equal(first[1][name], second[1][name]), name


def test_ranks_round_bfloat16_weights_alike(workers):
    rows, options = tiny.random_rows(10), {"epochs": 2, "batch_size": 4, "seed": 3}
    options |= {"micro_batch_size": 2, "rounding": "stochastic"}
    first, second = workers.run(remote.train_rows, rows, {"dtype": torch.bfloat16}, **options)
    assert first[0] == second[0]
    for name, weight in first[1].items():
        assert torch.equal(weight, second[1][name]), name


def test_every_rank_gets_the_verdicts_of_all_rows(workers, llama):
    rows = tiny.answered_rows(llama, 7, wrong=(0, 4))
    expected = [index not in (0, 4) for index in range(7)]
    assert workers.run(remote.verdicts, rows, MODEL, batch_size=2) == [expected, expected]


def test_loss_and_kl_on_a_text_are_bit_identical_on_two_ranks(workers):
    """79 windows in three passes: the second rank repeats the last one without counting it."""
    both = (MODEL, {"seed": 1})
    expected = remote.loss_and_kl(5000, *both)
    assert min(expected) > 0.1
    assert workers.run(remote.loss_and_kl, 5000, *both) == [expected, expected]


def test_sums_and_gathers_keep_dtypes_and_shapes(workers):
    for tensors, gathered in workers.run(remote.exchanged):
        assert torch.equal(tensors[0], torch.full((2, 3), 3.0))
        assert torch.equal(tensors[1], torch.tensor(30))
        assert torch.equal(tensors[2], torch.tensor([1.5], dtype=torch.float64))
        assert torch.equal(tensors[3], torch.full((2, 3), 3.0))
        assert torch.equal(torch.stack(gathered), torch.tensor([[1, -1], [2, -2]]))


@pytest.mark.parametrize("bucket_bytes", [1, 60, 200])
def test_gradients_summed_in_buckets_are_those_of_one_flat_sum(workers, bucket_bytes):
    for found, flat in workers.run(remote.sums_in_buckets, bucket_bytes):
        for each, expected in zip(found, flat, strict=True):
            assert each.dtype == expected.dtype
            assert torch.equal(each, expected)


def test_a_sum_needs_a_bucket_of_extra_memory(monkeypatch):
    """Messages of 2 small tensors each, but a large one as it is."""
    sent = recorded_sums(monkeypatch)
    large, turned = torch.ones(50), torch.ones(8, 5).T
    small = [torch.ones(12) for _ in range(5)]
    tensors = [small[0], large, *small[1:], turned, torch.ones(3, dtype=torch.float64)]
    distributed.sum_in_place(tensors)
    assert [len(t.flatten()) for t in sent] == [12, 50, 24, 24, 40, 3]
    assert sent[1] is large
    assert all((t == 2).all() for t in tensors)


def recorded_sums(monkeypatch) -> list[torch.Tensor]:
    """What two ranks with the same tensors send, in buckets of 100 bytes."""
    sent: list[torch.Tensor] = []

    def all_reduce(tensor: torch.Tensor, async_op: bool) -> SimpleNamespace:
        sent.append(tensor.mul_(2))
        return SimpleNamespace(wait=lambda: None)

    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "BUCKET_BYTES", 100)
    monkeypatch.setattr(distributed.dist, "all_reduce", all_reduce)
    return sent


def test_gradients_are_sent_during_the_backward_pass_from_the_last_layer_on(monkeypatch):
    """Not after it: the first layer's gradient does not exist yet when those of the last leave."""
    sent = recorded_sums(monkeypatch)
    layers = [torch.nn.Linear(5, 5, bias=False) for _ in range(3)]
    sent_before: list[int] = []
    for layer in layers:
        layer.weight.register_hook(lambda gradient: sent_before.append(len(sent)))
    unused = torch.nn.Parameter(torch.ones(4))
    parameters = [layer.weight for layer in layers] + [unused]
    with gradients.summed(parameters):
        torch.nn.Sequential(*layers)(torch.ones(2, 5)).sum().backward()
    assert sent_before == [0, 0, 0]
    assert torch.equal(unused.grad, torch.zeros(4))
    sent.clear()
    with gradients.summed(parameters[:3]):
        torch.nn.Sequential(*layers)(torch.ones(2, 5)).sum().backward()
    assert sent_before[3:] == [0, 1, 2]
    assert all(message is p.grad for message, p in zip(sent, reversed(parameters[:3]), strict=True))


@pytest.mark.parametrize("bucket_bytes", [1, 300, 10**6])
def test_gradients_are_summed_alike_where_ranks_use_other_parameters(workers, bucket_bytes):
    """Each rank skips an expert that the other uses; both skip the last one."""
    for found, expected in workers.run(remote.gradients_of_experts, bucket_bytes):
        for each, wanted in zip(found, expected, strict=True):
            assert torch.equal(each, wanted)


def test_collectives_are_the_identity_in_a_single_process():
    tensors, gathered = remote.exchanged()
    assert torch.equal(tensors[0], torch.ones(2, 3))
    assert torch.equal(tensors[1], torch.tensor(10))
    assert [g.tolist() for g in gathered] == [[1, -1]]


@pytest.mark.slow  # It needs processes of its own: afterwards these cannot meet again.
def test_a_meeting_waits_longer_than_the_timeout_of_collectives(tmp_path):
    own = remote.Workers(tmp_path)
    try:
        assert (
            min(own.run(remote.wait_for_a_slow_rank, "meet", 1.5, 0.5)) > 1.0
        )  # Ranks leave a meeting 0.2 s apart.
        assert max(own.run(remote.wait_for_a_slow_rank, "meet", 0.0, 0.5)) < 1.0
    finally:
        own.close()


@pytest.mark.slow
@pytest.mark.parametrize("wait", ["sum", "gather", "broadcast", "object", "sharded"])
def test_a_collective_fails_after_the_timeout_of_the_group(tmp_path, wait):
    """It is not Ray's or torch's default of half an hour, and a longer one is waited for."""
    own = remote.Workers(tmp_path)
    try:
        assert min(own.run(remote.wait_for_a_slow_rank, wait, 1.5, 10)) > 1.0
        with pytest.raises(RuntimeError, match=r"(?i)timed out|timeout|closed"):
            own.run(remote.wait_for_a_slow_rank, wait, 4, 1)
    finally:
        own.close()


def test_every_rank_has_rank_zeros_bases_where_machines_round_differently(workers):
    first, second = workers.run(remote.bases_of_rank_zero)
    for name, tensor in first["found"].items():
        assert torch.equal(second["found"][name], tensor), name
    assert first["found"]["q"].shape == (6, 2)
    assert first["shared"]
    assert second["shared"]  # As the optimizer relies on: one copy for query, key and value.
    assert first["sent"] == 2
    assert first["strides"]["o"] == second["strides"]["o"] == (1, 6)
