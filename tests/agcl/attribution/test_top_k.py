"""The running K largest values: equal to torch.topk, whatever the order and grouping."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agcl.attribution.top_k import TopK

SHAPE = (3, 4)


def samples(count, seed=0):
    """Values with many ties, and of several magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(-4, 5, (count, *SHAPE), generator=generator).float()
    return list(drawn * torch.tensor([1.0, 1e-3, 1e4, 0.1]))


def running(values, k):
    top = TopK(k, torch.zeros(SHAPE))
    for value in values:
        top.merge(value.unsqueeze(0), 1)
    return top


@pytest.mark.parametrize("k", [1, 2, 4, 9])
@pytest.mark.parametrize("count", [1, 3, 4, 20])
def test_values_and_mean_equal_torch_topk_of_the_stack(k, count):
    values = samples(count)
    expected = torch.stack(values).topk(min(k, count), dim=0).values
    top = running(values, k)
    assert torch.equal(top.values[: min(k, count)], expected)
    assert torch.equal(top.mean(), expected.mean(0))
    assert top.count == count


@given(order=st.permutations(range(7)), k=st.integers(1, 8))
@settings(max_examples=40, deadline=None)
def test_state_does_not_depend_on_the_order_of_insertion(order, k):
    values = samples(7)
    first, second = running(values, k), running([values[i] for i in order], k)
    assert torch.equal(first.values, second.values)
    assert torch.equal(first.mean(), second.mean())


@given(parts=st.lists(st.integers(0, 6), min_size=1, max_size=4), k=st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_merging_states_equals_the_state_of_all_values(parts, k):
    groups = [samples(size, seed) for seed, size in enumerate(parts)]
    whole = running([value for group in groups for value in group], k)
    merged = running([], k)
    for group in groups:
        other = running(group, k)
        kept = other.values.clone()
        merged.merge(other.values, other.count)
        assert torch.equal(other.values, kept)
    assert torch.equal(merged.values, whole.values)
    assert merged.count == whole.count
    assert torch.equal(merged.mean(), whole.mean())


def test_all_negative_values_are_kept_as_they_are():
    values = [torch.full(SHAPE, -3.0), torch.full(SHAPE, -1.0), torch.full(SHAPE, -2.0)]
    assert torch.equal(running(values, 2).mean(), torch.full(SHAPE, -1.5))


def test_nothing_inserted_means_zeros():
    assert torch.equal(running([], 3).mean(), torch.zeros(SHAPE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 4, 6])
@pytest.mark.parametrize("tile", [1, 100, 2**18])
@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [(5, 17, 11), (16, 600, 21), (19, 3, 1)])
def test_products_are_those_of_every_sample_alone(
    monkeypatch, dtype, k, tile, tokens, inputs, outputs
):
    """In float32 by compiled code, else by plain operations; tiles of one row, some and all."""
    monkeypatch.setattr("agcl.attribution.top_k._TILE_ENTRIES", tile)
    generator = torch.Generator().manual_seed(0)
    x, g, weight = (
        torch.randn(shape, generator=generator, dtype=dtype)
        for shape in [(6, tokens, inputs), (6, tokens, outputs), (outputs, inputs)]
    )
    slow = [weight.double() * (g[b].double().T @ x[b].double()) for b in range(6)]
    expected = torch.stack(slow).topk(k, dim=0).values

    top = TopK(k, weight)
    top.insert_products(weight, x[:4], g[:4])
    top.insert_products(weight, x[4:], g[4:])
    alone = TopK(k, weight)
    for b in (3, 5, 0, 2, 1, 4):
        alone.insert_products(weight, x[b : b + 1], g[b : b + 1])

    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(top.values.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(alone.values, top.values, rtol=tolerance, atol=tolerance)
    assert top.count == alone.count == 6


@pytest.mark.parametrize("k", [1, 4, 6])
@pytest.mark.parametrize("tile", [1, 2**18])
@pytest.mark.parametrize("compiled", [True, False])
def test_bfloat16_keeps_the_rounded_largest_whatever_the_order(monkeypatch, k, tile, compiled):
    monkeypatch.setattr("agcl.attribution.top_k._TILE_ENTRIES", tile)
    monkeypatch.setattr(TopK, "_fits_the_cpu_kernel", lambda self, weight: compiled)
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(9, 5, n, generator=generator) for n in (70, 19))
    weight = torch.randn(19, 70, generator=generator)
    wide, halved, backwards = (TopK(k, weight, dtype) for dtype in (None, *[torch.bfloat16] * 2))
    for b in range(9):
        wide.insert_products(weight, x[b : b + 1], g[b : b + 1])
        halved.insert_products(weight, x[b : b + 1], g[b : b + 1])
    backwards.insert_products(weight, x[5:].flip(0), g[5:].flip(0))
    other = TopK(k, weight, torch.bfloat16)
    other.insert_products(weight, x[:5], g[:5])
    backwards.merge(other.values, other.count)

    assert torch.equal(halved.values, wide.values.bfloat16())
    torch.testing.assert_close(backwards.values, halved.values, rtol=0.01, atol=1e-6)
    assert halved.mean().dtype == torch.float32
    assert torch.equal(halved.mean(), halved.values.float().mean(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_entry_does_not_depend_on_those_beside_it(dtype):
    x, g, weight = torch.randn(3, 5, 64), torch.randn(3, 5, 16), torch.randn(16, 64)
    tiles, alone = TopK(2, weight, dtype), TopK(2, weight[:3, :7], dtype)
    tiles.insert_products(weight, x, g)
    alone.insert_products(weight[:3, :7].contiguous(), x[:, :, :7], g[:, :, :3])
    assert torch.equal(tiles.values[:, :3, :7], alone.values)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_share_the_rows_and_are_left_as_they_were(threads):
    x, g, weight = torch.randn(2, 5, 40), torch.randn(2, 5, 43), torch.randn(43, 40)
    alone, top = TopK(2, weight), TopK(2, weight)
    alone.insert_products(weight, x, g)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        top.insert_products(weight, x, g)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(top.values, alone.values)


@pytest.mark.slow
def test_the_first_insertion_of_a_process_leaves_torchs_threads():
    code = (
        "import torch; from agcl.attribution.top_k import TopK; torch.set_num_threads(1)\n"
        "weight = torch.zeros(4, 4); x = torch.zeros(1, 2, 4)\n"
        "TopK(1, weight).insert_products(weight, x, x); assert torch.get_num_threads() == 1"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_weight_can_still_be_resized_as_fsdp_does():
    weight = torch.randn(4, 4)
    TopK(1, weight).insert_products(weight, torch.randn(1, 2, 4), torch.randn(1, 2, 4))
    weight.untyped_storage().resize_(0)


def test_a_transposed_weight_and_no_samples_are_no_special_case():
    weight = torch.randn(5, 3).T
    top = TopK(2, torch.zeros(3, 5))
    top.insert_products(weight, torch.randn(0, 4, 5), torch.randn(0, 4, 3))
    assert torch.equal(top.mean(), torch.zeros(3, 5))
    x, g = torch.randn(1, 4, 5), torch.randn(1, 4, 3)
    top.insert_products(weight, x, g)
    torch.testing.assert_close(top.values[0], weight * (g[0].T @ x[0]))


def test_a_value_that_is_no_number_stays_in_sight():
    top = TopK(2, torch.zeros(2, 2))
    top.values.fill_(torch.nan)
    top.insert_products(torch.ones(2, 2), torch.randn(3, 1, 2), torch.randn(3, 1, 2))
    assert top.mean().isnan().all()
