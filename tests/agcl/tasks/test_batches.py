"""Padding, labels and the order of rows."""

import pytest
import torch

from agcl.tasks import Encoded
from agcl.tasks.batches import (
    IGNORED,
    answer_places,
    answer_tokens,
    collate,
    in_order,
    micro_batches,
    pack,
    shuffled,
)


def test_rows_are_right_padded_and_only_answers_are_labeled():
    batch = collate([Encoded([4, 5, 6], 1), Encoded([7, 8, 9, 2, 1], 3)])
    assert batch.input_ids.tolist() == [[4, 5, 6, 0, 0], [7, 8, 9, 2, 1]]
    x = IGNORED
    assert batch.labels.tolist() == [[x, 5, 6, x, x], [x, x, x, 2, 1]]
    assert batch.lengths.tolist() == [3, 5]
    # The logit at position t predicts the token at t + 1.
    assert answer_places(batch).int().tolist() == [[1, 1, 0, 0], [0, 0, 1, 1]]
    assert answer_tokens(batch).tolist() == [5, 6, 2, 1]


def test_packed_rows_are_consecutive_and_never_predict_the_next_rows_first_token():
    batch = pack([Encoded([4, 5], 0), Encoded([7, 8, 9, 2, 1], 3), Encoded([6, 3, 1], 2)])
    x = IGNORED
    assert batch.input_ids.tolist() == [[7, 8, 9, 2, 1, 6, 3, 1, 4, 5]]
    assert batch.labels.tolist() == [[x, x, x, 2, 1, x, x, 1, x, 5]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 0, 1]]
    assert batch.lengths.tolist() == [10]


def test_earlier_turns_of_a_conversation_are_labeled_too():
    talk = Encoded([7, 8, 9, 2, 1, 3], 5, ((0, 2), (3, 4)))
    batch = pack([talk, Encoded([4, 5], 1)])
    x = IGNORED
    assert batch.labels.tolist() == [[x, 8, x, 2, x, 3, x, 5]]
    assert collate([talk]).labels.tolist() == [[x, 8, x, 2, x, 3]]
    assert talk.loss_tokens == len(answer_tokens(collate([talk]))) == 3


@pytest.mark.parametrize("longest", [60, 300])
def test_packed_lines_have_bounded_similar_lengths_and_hold_every_row_once(longest):
    rows = [Encoded([1000 * n + i for i in range(n)], 1) for n in range(20, longest)]
    batch = pack(rows)
    bound = max(256, longest)
    assert batch.input_ids.shape[1] <= 1.05 * bound
    assert batch.lengths.min() > 0.9 * batch.lengths.max() > 0.8 * bound
    real = torch.arange(batch.input_ids.shape[1]) < batch.lengths.unsqueeze(1)
    assert sorted(batch.input_ids[real].tolist()) == [i for row in rows for i in row.input_ids]


def test_long_rows_are_packed_without_doubling_a_line():
    """Rows that fill a line but for a few tokens: two of them in a line would pad all others."""
    rows = [Encoded(list(range(240)), 1)] * 16
    assert pack(rows).input_ids.shape == (16, 240)


def test_a_pass_of_packed_rows_has_at_most_so_many_tokens_with_its_padding():
    generator = torch.Generator().manual_seed(0)
    for most in (300, 600, 2000):
        lengths = torch.randint(2, 400, (50,), generator=generator).tolist()
        passes = micro_batches(lengths, max_tokens=most, packing=True)
        assert sorted(i for each in passes for i in each) == list(range(50))
        sizes = [
            pack([Encoded([0] * lengths[i], 1) for i in each]).input_ids.numel() for each in passes
        ]
        assert all(size <= most or len(each) == 1 for size, each in zip(sizes, passes, strict=True))
        assert sum(sizes) < 1.5 * sum(lengths)


def test_padding_does_not_change_a_rows_logits(llama):
    short, long = Encoded([4, 5, 6], 1), Encoded([7, 8, 9, 2, 1, 3], 3)
    with torch.no_grad():
        alone = llama(collate([short]).input_ids, use_cache=False).logits
        padded = llama(collate([short, long]).input_ids, use_cache=False).logits
    torch.testing.assert_close(padded[:1, :3], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "size", "expected"),
    [(5, 2, [[0, 1], [2, 3], [4]]), (4, 2, [[0, 1], [2, 3]]), (2, 9, [[0, 1]]), (0, 3, [])],
)
def test_batches_in_order(rows, size, expected):
    assert in_order(rows, size) == expected


def test_shuffled_batches_hold_every_row_once_ordered_by_seed_and_epoch():
    orders = {}
    for seed in range(3):
        for epoch in range(3):
            batches = list(shuffled(23, 4, seed=seed, epoch=epoch))
            assert [len(b) for b in batches] == [4, 4, 4, 4, 4, 3]
            flat = tuple(i for b in batches for i in b)
            assert sorted(flat) == list(range(23))
            assert list(shuffled(23, 4, seed=seed, epoch=epoch)) == batches
            orders[flat] = seed, epoch
    assert len(orders) == 9


def test_the_order_of_rows_does_not_depend_on_batch_size_or_global_randomness():
    torch.manual_seed(1)
    small = [i for b in shuffled(10, 3, seed=5, epoch=0) for i in b]
    torch.manual_seed(2)
    state = torch.get_rng_state()
    large = [i for b in shuffled(10, 10, seed=5, epoch=0) for i in b]
    assert small == large
    assert torch.equal(torch.get_rng_state(), state)
