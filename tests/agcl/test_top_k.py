"""The running K largest values: equal to torch.topk, whatever the order and grouping."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agcl.importance import TopK

SHAPE = (3, 4)


def samples(count, seed=0):
    """Values with many ties, and of several magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(-4, 5, (count, *SHAPE), generator=generator).float()
    return list(drawn * torch.tensor([1.0, 1e-3, 1e4, 0.1]))


def running(values, k):
    top = TopK(k, torch.zeros(SHAPE))
    for value in values:
        top.insert(value.clone())
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
