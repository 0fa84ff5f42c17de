"""Scaling, overlap and summaries on values computed by hand."""

from math import log

import pytest
import torch
from reference.moments import whole

from agcl.importance import Importance, by_layer_and_module, overlap, running_sum, scaled


def test_scaling_is_logarithmic_with_negative_relevance_as_zero():
    entries = torch.tensor([[-8.0, 0.0], [1.0, 2.0]])
    expected = torch.tensor([[0.0, 0.0], [log(1 + 3 / 2) / log(1 + 3), 1.0]])
    torch.testing.assert_close(scaled(entries, 3.0), expected)


def test_scaling_accepts_bfloat16_and_does_not_change_its_argument():
    entries = torch.tensor([-1.0, 4.0, 1.0], dtype=torch.bfloat16)
    before = entries.clone()
    result = scaled(entries, 1000.0)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, torch.tensor([0.0, 1.0, log(251) / log(1001)]))
    assert torch.equal(entries, before)
    same = torch.tensor([1.0, 2.0])
    scaled(same, 3.0).zero_()
    assert torch.equal(same, torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("entries", [torch.zeros(2, 3), -torch.ones(2, 3)])
def test_without_positive_relevance_nothing_is_important(entries):
    assert torch.equal(scaled(entries, 10.0), torch.zeros(2, 3))


@pytest.mark.parametrize("unit", [1e-36, 1e-20, 1e-3, 1e20])
def test_scaling_does_not_depend_on_the_unit_of_relevance(unit):
    entries = torch.tensor([-1.0, 0.0, 0.5, 2.0])
    torch.testing.assert_close(scaled(entries * unit, 1e5), scaled(entries, 1e5))


def tasks(*values, name="model.layers.0.mlp.up_proj.weight"):
    return [Importance({name: torch.tensor(v)}) for v in values]


def test_overlap_is_the_shared_fraction_of_top_entries_over_all_weights():
    def task(first, second):
        a, b = torch.zeros(8), torch.zeros(4)
        a[first], b[second] = 1.0, 1.0
        return Importance({"a": a, "b": b})

    # A quarter: two entries of `a` and one of `b`.
    three = [task([0, 1], [0]), task([1, 2], [0]), task([4, 5], [3])]
    expected = [[1, 2 / 3, 0], [2 / 3, 1, 0], [0, 0, 1]]
    for row, wanted in zip(overlap(three, share=0.25), expected, strict=True):
        assert row == pytest.approx(wanted)


def test_overlap_ranks_by_value_not_by_magnitude():
    """A large negative relevance is not among the top entries."""
    one, other = tasks([-9.0, 3.0, 1.0, 0.0], [9.0, 0.0, 0.0, 0.0], name="a")
    assert overlap([one, other], share=0.25) == [[1.0, 0.0], [0.0, 1.0]]


def test_overlap_takes_at_least_one_entry_of_a_weight():
    assert overlap(tasks([1.0, 2.0], [3.0, 4.0], name="a"), share=0.01) == [[1, 1], [1, 1]]


def test_positive_relevance_is_summed_per_layer_and_module_kind():
    importance = Importance(
        {
            f"model.layers.{layer}.{kind}.weight": torch.tensor([[layer + 1.0, -7.0], [0.5, 0.0]])
            for layer in (0, 1, 10, 2)  # As files have them: in the order of the names as text.
            for kind in ("self_attn.q_proj", "mlp.up_proj")
        }
    )
    assert by_layer_and_module(importance) == {
        "self_attn.q_proj": [1.5, 2.5, 3.5, 11.5],
        "mlp.up_proj": [1.5, 2.5, 3.5, 11.5],
    }


def test_a_tensor_without_relevance_has_no_overlap():
    """Rules `cp` give queries and keys none."""
    one, other = (
        Importance({"a": torch.tensor(values), "cut_off": torch.zeros(4)})
        for values in ([0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 1.0, 0.0])
    )
    assert overlap([one, other]) == [[1, 0], [0, 1]]
    zero = Importance({"a": torch.zeros(4), "cut_off": torch.zeros(4)})
    assert overlap([one, zero]) == [[1, 0], [0, 1]]


def test_a_sum_says_what_all_its_parts_were_measured_with():
    def task(estimator, unit_inputs):
        header = {"estimator": estimator, "unit_inputs": unit_inputs, "rows": 3}
        return Importance({}, {"a": whole(torch.eye(2))}, header)

    sums = running_sum([task("lrp", False), task("lrp", True)], keep=1)
    assert sums.header == {"estimator": "lrp", "tasks": 2, "kept": 1.0}
    both = running_sum([sums, task("lrp", True)], keep=1)
    assert both.header == {"estimator": "lrp", "tasks": 3, "kept": 1.0}
    equal = running_sum([task("lrp", False), task("lrp", False)], keep=1)
    assert equal.header == {"estimator": "lrp", "unit_inputs": False, "tasks": 2, "kept": 1.0}
