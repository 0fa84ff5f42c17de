"""Importance of weights: which samples count, and independence of batches and order."""

import copy

import pytest
import torch
from bench.precision import shared_directions
from reference import slow_importance, tiny
from reference.moments import matrices

from agcl.attribution import attribute
from agcl.attribution.attribute import NoCorrectAnswer
from agcl.model import adapter
from agcl.tasks.batches import collate, in_order, pack

ROWS = 9
WRONG = (1, 5)


def batches(rows, batch_size):
    return [collate([rows[i] for i in chunk]) for chunk in in_order(len(rows), batch_size)]


@pytest.fixture
def rows(llama):
    return tiny.answered_rows(llama, ROWS, wrong=WRONG)


@pytest.fixture
def right(rows):
    return [row for index, row in enumerate(rows) if index not in WRONG]


@pytest.mark.parametrize("top_k", [1, 2, 4, None, 7, 50])
@pytest.mark.parametrize("rules", ["attnlrp", "cp"])
def test_importance_is_the_mean_of_each_entrys_largest_relevances(llama, rows, right, top_k, rules):
    expected = slow_importance.importance(llama, right, top_k=top_k, rules=rules)
    found = attribute(llama, batches(rows, 4), top_k=top_k, rules=rules)
    assert found.entries.keys() == expected.keys()
    for name, entries in found.entries.items():
        assert entries.dtype == torch.float32
        torch.testing.assert_close(entries, expected[name].float(), rtol=2e-3, atol=2e-6, msg=name)


@pytest.mark.parametrize("top_k", [1, 2, 4, None])
def test_importance_does_not_depend_on_batch_size(llama, rows, top_k):
    one_by_one = attribute(llama, batches(rows, 1), top_k=top_k)
    for batch_size in (3, 8):
        found = attribute(llama, batches(rows, batch_size), top_k=top_k)
        for name, entries in found.entries.items():
            torch.testing.assert_close(
                entries, one_by_one.entries[name], rtol=1e-4, atol=1e-7, msg=name
            )


@pytest.mark.parametrize("top_k", [1, 2, 4, None])
def test_importance_does_not_depend_on_the_order_of_rows(llama, rows, top_k):
    found = attribute(llama, batches(rows, 3), top_k=top_k, moments="relevance")
    shuffled = [rows[i] for i in (4, 8, 0, 5, 3, 7, 1, 6, 2)]
    other = attribute(llama, batches(shuffled, 3), top_k=top_k, moments="relevance")
    for name, entries in found.entries.items():
        torch.testing.assert_close(entries, other.entries[name], rtol=1e-4, atol=1e-7, msg=name)
    for name, matrix in matrices(found.moments).items():
        expected = other.moments[name].matrix()
        torch.testing.assert_close(matrix, expected, rtol=1e-4, atol=1e-4, msg=name)


def test_with_fewer_rows_than_k_all_rows_are_averaged(llama, right):
    two = right[:2]
    singles = [attribute(llama, batches([row], 1), top_k=1).entries for row in two]
    found = attribute(llama, batches(two, 2), top_k=4)
    for name, entries in found.entries.items():
        mean = (singles[0][name] + singles[1][name]) / 2
        torch.testing.assert_close(entries, mean, rtol=1e-4, atol=1e-7, msg=name)


def test_incorrectly_answered_rows_do_not_count(llama, rows, right):
    mixed = attribute(llama, batches(rows, 3), top_k=2, moments="relevance")
    alone = attribute(llama, batches(right, 3), top_k=2, moments="relevance")
    for name, entries in mixed.entries.items():
        torch.testing.assert_close(entries, alone.entries[name], rtol=1e-4, atol=1e-7, msg=name)
    expected = matrices(alone.moments)
    for name, matrix in matrices(mixed.moments).items():
        torch.testing.assert_close(matrix, expected[name], rtol=1e-4, atol=1e-4, msg=name)
    assert mixed.header["rows"] == ROWS
    assert mixed.header["rows_attributed"] == ROWS - len(WRONG)


@pytest.mark.parametrize("top_k", [3, None])
def test_incorrect_rows_count_without_correct_only(llama, rows, top_k):
    expected = slow_importance.importance(llama, rows, top_k=top_k)
    found = attribute(llama, batches(rows, 4), top_k=top_k, correct_only=False)
    assert found.header["rows_attributed"] == ROWS
    for name, entries in found.entries.items():
        torch.testing.assert_close(entries, expected[name].float(), rtol=2e-3, atol=2e-6, msg=name)


@pytest.mark.parametrize("rules", ["attnlrp", "cp"])
def test_no_correct_answer_raises_an_error(llama, rules):
    rows = tiny.answered_rows(llama, 5, wrong=(0, 1, 2, 3, 4))
    with pytest.raises(NoCorrectAnswer, match=r"none of the 5 rows .*; with correct_only=False"):
        attribute(llama, batches(rows, 2), rules=rules)


def test_no_batches_are_not_called_wrong_answers(llama, rows):
    used_up = iter(batches(rows, 4))
    attribute(llama, used_up)
    for none in ([], used_up):
        with pytest.raises(ValueError, match="no batches"):
            attribute(llama, none)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("estimator", "magic"),
        ("moments", "answers"),
        ("split", "rows"),
        ("top_k", 0),
        ("running_values", "float16"),
        ("precision", "half"),
        ("keep", 0),
        ("rules", ""),
    ],
)
def test_an_argument_with_an_unknown_value_is_named(llama, rows, argument, value):
    with pytest.raises(ValueError, match=rf"^{argument} must be .* not "):
        attribute(llama, batches(rows, 4), **{argument: value})


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.bfloat16, "float32"), (torch.float16, "float32"), (torch.float16, "bfloat16")],
)
def test_a_model_in_half_precision_is_refused(rows, dtype, precision):
    with pytest.raises(ValueError, match=r"load it with dtype=torch\.float32"):
        attribute(tiny.llama(dtype=dtype), batches(rows, 4), precision=precision)


def test_under_autocast_relevance_arrives_at_an_input_from_base_and_adapter():
    """PEFT casts the input of float32 factors, and the copy would be an input of its own."""
    torch.manual_seed(0)
    model = adapter.attach(tiny.llama(), rank=4, alpha=8, seed=0).get_base_model()
    with torch.no_grad():
        for name, factor in model.named_parameters():
            if "lora_B" in name:
                factor.normal_(std=0.2)
    options = {"moments": "relevance", "entries": False, "correct_only": False, "keep": 1}
    exact, rounded = (
        attribute(model, [collate(tiny.random_rows(16))], precision=precision, **options)
        for precision in ("float32", "bfloat16")
    )
    for name, moment in exact.moments.items():
        matrix = moment.matrix()
        error = (matrix - rounded.moments[name].matrix()).norm() / matrix.norm()
        assert error < 0.05, name


@pytest.mark.parametrize("estimator", ["lrp", "grad_x_param", "fisher"])
def test_bfloat16_weights_give_nearly_what_they_give_in_float32(estimator):
    rows = tiny.random_rows(24)
    half = tiny.llama(dtype=torch.bfloat16)
    options = {"moments": "relevance", "correct_only": False, "estimator": estimator}
    exact = attribute(copy.deepcopy(half).float(), batches(rows, 8), **options)
    found = attribute(half, batches(rows, 8), precision="bfloat16", **options)
    assert found.inputs == exact.inputs
    shares = shared_directions(exact, found).values()
    assert min(share for kind in shares for share in kind) > 0.995
    for name, entries in exact.entries.items():
        assert found.entries[name].dtype == torch.float32
        pair = torch.stack([entries.flatten(), found.entries[name].flatten()])
        assert torch.corrcoef(pair)[0, 1] > 0.99, name


def test_a_peft_wrapper_says_what_to_pass_instead(llama, rows):
    wrapped = adapter.attach(llama, rank=2, alpha=2.0, seed=0)
    with pytest.raises(ValueError, match=r"pass model\.get_base_model\(\)"):
        attribute(wrapped, batches(rows, 4))
    assert attribute(wrapped.get_base_model(), batches(rows, 4), correct_only=False).entries


def test_layers_that_cp_cuts_off_have_no_importance(llama, rows):
    for top_k in (2, None):
        found = attribute(llama, batches(rows, 4), top_k=top_k, rules="cp")
        for name, entries in found.entries.items():
            cut = any(part in name for part in ("q_proj", "k_proj", "gate_proj"))
            assert bool(entries.any()) != cut, name


def test_the_model_is_restored_even_after_an_exception(llama, rows, gradients):
    llama.train()
    slopes = gradients(llama)

    def breaking_off():
        yield from batches(rows[:3], 3)
        raise OSError("disk gone")

    attribute(llama, batches(rows, 3))
    with pytest.raises(OSError, match="disk gone"):
        attribute(llama, breaking_off())

    assert llama.training
    assert all(p.requires_grad and p.grad is None for p in llama.parameters())
    for name, slope in gradients(llama).items():
        assert torch.equal(slope, slopes[name]), name


def test_progress_counts_rows(llama, rows):
    done = []
    attribute(llama, batches(rows, 4), log=done.append)
    assert done == [4, 8, 9]


def test_importances_have_no_graph_and_own_their_memory(llama, rows):
    found = attribute(llama, batches(rows, 4), moments="uniform")
    weights = {name: p.detach().clone() for name, p in llama.named_parameters()}
    for tensor in [*found.entries.values(), *(m.directions for m in found.moments.values())]:
        assert not tensor.requires_grad
        tensor.zero_()
    assert all(torch.equal(p, weights[name]) for name, p in llama.named_parameters())


@pytest.mark.parametrize("top_k", [2, None])
def test_a_layer_that_outputs_zeros_has_zero_importance_not_nan(llama, top_k):
    """New blocks of an expanded model start with such layers."""
    llama.model.layers[1].self_attn.o_proj.weight.data.zero_()
    llama.lm_head.weight.data.mul_(1e3)  # Large gradients reach the layer.
    rows = tiny.answered_rows(llama, 3)
    found = attribute(llama, batches(rows, 3), top_k=top_k, moments="relevance")
    found.check_finite()
    assert not found.entries["model.layers.1.self_attn.o_proj.weight"].any()


def test_a_packed_batch_is_refused(llama, rows):
    with pytest.raises(ValueError, match=r"a packed batch cannot be attributed.*use collate"):
        attribute(llama, [pack(rows)])
