"""Second moments of layer inputs, against a loop over tokens."""

import pytest
import torch
from reference import slow_importance, tiny

from agcl.attribution import attribute
from agcl.attribution import inputs as summed_inputs
from agcl.importance import Moment
from agcl.parallel import distributed
from agcl.tasks.batches import collate, in_order

WRONG = (2, 3, 4)
"""Batches of three that start at row 2 include one that is all wrong; from row 0 none is."""


def moments(model, rows, batch_size=3, **options):
    """The moments as matrices, of which nothing is cut off."""
    batches = [collate([rows[i] for i in b]) for b in in_order(len(rows), batch_size)]
    found = attribute(model, batches, keep=1, **options).moments
    for name, moment in found.items():
        assert moment.kept == pytest.approx(1, abs=1e-5), name
        assert moment.trace == pytest.approx(float(moment.energies.sum()), rel=1e-5)
    return {name: moment.matrix() for name, moment in found.items()}


@pytest.fixture
def rows(llama):
    return tiny.answered_rows(llama, 9, wrong=WRONG)


@pytest.fixture
def right(rows):
    return [row for index, row in enumerate(rows) if index not in WRONG]


@pytest.mark.parametrize(("top_k", "unit"), [(2, True), (None, False)])
@pytest.mark.parametrize("rules", ["attnlrp", "cp"])
@pytest.mark.parametrize("weighting", ["relevance", "uniform", "answer"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_moments_equal_a_loop_over_the_tokens_of_correct_rows(
    llama, rows, right, weighting, rules, top_k, unit, batch_size
):
    options = {"rules": rules, "unit_inputs": unit}
    expected = slow_importance.second_moments(llama, right, weighting=weighting, **options)
    found = moments(llama, rows, batch_size, moments=weighting, top_k=top_k, **options)
    assert found.keys() == expected.keys()
    for name, moment in found.items():
        scale = float(expected[name].diagonal().mean())
        torch.testing.assert_close(
            moment.double(), expected[name], rtol=1e-3, atol=1e-4 * scale, msg=name
        )


def test_earlier_turns_of_a_conversation_are_attributed_too(llama):
    """With inputs of length 1, a moment's trace counts the tokens that predict an answer's."""
    rows = [tiny.Encoded([3, 4, 5, 6, 7, 8], 5, ((0, 2), (3, 4))), tiny.Encoded([3, 4, 5], 2)]
    options = {"moments": "answer", "entries": False, "correct_only": False}
    for moment in moments(llama, rows, **options).values():
        assert float(moment.trace()) == pytest.approx(3 + 1, rel=1e-4)


@pytest.mark.parametrize("rules", ["attnlrp", "cp"])
@pytest.mark.parametrize("weighting", ["relevance", "uniform", "answer"])
def test_without_entries_the_moments_are_bit_identical(llama, rows, weighting, rules, monkeypatch):
    batches = [collate(rows[:4]), collate(rows[4:])]
    options = {"moments": weighting, "rules": rules}
    whole = attribute(llama, batches, **options)
    backward, calls = torch.Tensor.backward, []
    monkeypatch.setattr(torch.Tensor, "backward", lambda t: calls.append(1) or backward(t))
    alone = attribute(llama, batches, entries=False, **options)
    assert len(calls) == (2 if weighting == "relevance" else 0)
    assert alone.entries == {}
    assert alone.weights == whole.weights == list(whole.inputs)
    for name, moment in whole.moments.items():
        assert torch.equal(alone.moments[name].directions, moment.directions)
        assert torch.equal(alone.moments[name].energies, moment.energies)
    assert not alone.is_zero()
    assert alone.header == whole.header


def test_requesting_neither_entries_nor_moments_is_an_error(llama, rows):
    with pytest.raises(ValueError, match="nothing to collect"):
        attribute(llama, [collate(rows)], entries=False)


def test_weighting_by_relevance_differs_from_uniform(llama, rows):
    weighted, uniform = (moments(llama, rows, moments=w) for w in ("relevance", "uniform"))
    assert not any(torch.allclose(weighted[n], uniform[n], rtol=1e-2) for n in uniform)


def test_with_unit_inputs_every_token_counts_equally(llama, right):
    tokens = sum(len(row.input_ids) - 1 for row in right)
    for name, moment in moments(llama, right, moments="uniform").items():
        assert float(moment.trace()) == pytest.approx(tokens, rel=1e-4), name
    for name, moment in moments(llama, right, moments="uniform", unit_inputs=False).items():
        assert float(moment.trace()) != pytest.approx(tokens, rel=1e-2), name


def test_layers_that_read_one_tensor_share_its_moment(llama, rows):
    found = attribute(llama, [collate(rows)], moments="uniform", entries=False)
    layer = "model.layers.1."
    assert {n: key for n, key in found.inputs.items() if n.startswith(layer)} == {
        f"{layer}{name}.weight": f"{layer}{key}.weight"
        for name, key in {
            "self_attn.q_proj": "self_attn.q_proj",
            "self_attn.k_proj": "self_attn.q_proj",
            "self_attn.v_proj": "self_attn.q_proj",
            "self_attn.o_proj": "self_attn.o_proj",
            "mlp.gate_proj": "mlp.gate_proj",
            "mlp.up_proj": "mlp.gate_proj",
            "mlp.down_proj": "mlp.down_proj",
        }.items()
    }


def test_moments_of_two_sets_of_rows_add_up(llama, right):
    first, second, both = (
        moments(llama, rows, moments="uniform") for rows in (right[:2], right[2:], right)
    )
    for name, moment in both.items():
        torch.testing.assert_close(
            moment, first[name] + second[name], rtol=1e-4, atol=1e-4, msg=name
        )


@pytest.mark.parametrize("weighting", ["relevance", "uniform", "answer"])
def test_rows_seen_twice_count_twice(llama, right, weighting):
    once = moments(llama, right, moments=weighting)
    twice = moments(llama, [*right, *right], moments=weighting)
    for name, moment in twice.items():
        torch.testing.assert_close(moment, 2 * once[name], rtol=1e-4, atol=1e-4, msg=name)


def test_a_last_batch_without_correct_answers_adds_nothing(llama):
    rows = tiny.answered_rows(llama, 6, wrong=(3, 4, 5))
    for rules in ("attnlrp", "cp"):
        alone = moments(llama, rows[:3], moments="relevance", rules=rules)
        found = moments(llama, rows, moments="relevance", rules=rules)
        for name, moment in found.items():
            assert torch.equal(moment, alone[name]), name


def test_moments_are_symmetric_and_absent_unless_requested(llama, rows):
    for name, moment in moments(llama, rows, moments="relevance").items():
        torch.testing.assert_close(moment, moment.T, rtol=1e-4, atol=1e-4, msg=name)
    assert not moments(llama, rows)


@pytest.mark.parametrize("weighting", ["relevance", "uniform", "answer"])
def test_moments_of_a_float64_model(exact_llama, weighting):
    rows = tiny.answered_rows(exact_llama, 3)
    expected = slow_importance.second_moments(exact_llama, rows, weighting=weighting)
    found = moments(exact_llama, rows, moments=weighting)
    for name, moment in found.items():
        torch.testing.assert_close(moment, expected[name], rtol=1e-4, atol=1e-4, msg=name)


def test_wide_inputs_are_summed_as_a_sketch_that_shares_its_test_matrix(llama, right):
    """Of fewer tokens than columns a sketch loses nothing."""
    batches = [collate(right[:1])] * 2
    assert len(right[0].input_ids) <= 11
    options = {"moments": "relevance", "entries": False, "keep": 1}
    whole, sketched = (attribute(llama, batches, **options, sketch=n) for n in (4096, 11))
    widths = {len(m.directions) for m in whole.moments.values()}
    assert max(widths) > 22 > min(widths)  # Wide and narrow ones.
    for name, moment in whole.moments.items():
        scale = float(moment.energies[0])
        found = sketched.moments[name]
        torch.testing.assert_close(found.matrix(), moment.matrix(), rtol=0, atol=2e-4 * scale)
        assert found.trace == pytest.approx(moment.trace)


@pytest.mark.parametrize("merge", [True, False])
def test_a_rank_decomposes_its_share_before_it_waits_for_another(merge, monkeypatch):
    order = []

    class Summed:
        def __init__(self):
            self.sum, self.totals = torch.zeros(2, 2), torch.zeros(3)

        def moment(self, *, keep):
            order.append("decomposed")
            return Moment(torch.eye(2)[:, :1], torch.ones(1, dtype=torch.float64), 1.0)

    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    monkeypatch.setattr(distributed, "sum_in_place", lambda tensors: None)
    monkeypatch.setattr(distributed, "broadcast", lambda t, source: (order.append("waited"), t)[1])
    names = ["a", "b", "c", "d"]
    owners = distributed.owners([4] * 4, 2)
    inputs = {n: Summed() for n, owner in zip(names, owners, strict=True) if merge or owner == 1}
    like, widths, sizes = torch.zeros(0), dict.fromkeys(names, 2), dict.fromkeys(names, 4)
    found = summed_inputs.collected(inputs, widths, sizes, like, keep=0.9, merge=merge)
    assert list(found) == names
    assert order[:2] == ["decomposed"] * 2
    assert "decomposed" not in order[2:]
