"""Logits of answer tokens only: equal to those of a full pass, for every family."""

import pytest
import torch
from reference import families
from torch.nn.functional import cross_entropy

from agcl.lrp import FAMILIES
from agcl.model.forward import activation_checkpointing, answer_logits, any_dtype_attention
from agcl.tasks import Encoded, batches
from agcl.tasks.batches import IGNORED, answer_places, answer_tokens, by_length, collate, pack

ROWS = [Encoded([3, 4, 5, 6, 7, 8], 4), Encoded([9, 10, 11], 1), Encoded([12, 13, 14, 15], 3)]


@pytest.mark.parametrize("architecture", FAMILIES)
def test_logits_and_gradients_equal_those_of_a_full_pass(architecture):
    model, batch = families.model(architecture), collate(ROWS)
    found = answer_logits(model, batch)
    whole = model(batch.input_ids, use_cache=False).logits[:, :-1][batch.labels[:, 1:] != IGNORED]
    assert found.shape == (5, families.VOCABULARY)
    torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-12)

    weights = list(model.parameters())
    of_found, of_whole = (
        torch.autograd.grad(logits.pow(2).sum(), weights) for logits in (found, whole)
    )
    for one, other in zip(of_found, of_whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.fixture(params=[8, 256])
def packed_line(request, monkeypatch):
    """Short lines, some of them padded, or one line for all rows."""
    monkeypatch.setattr(batches, "_LINE_TOKENS", request.param)


def long_rows():
    """Rows longer and shorter than the families' sliding windows; no token repeats."""
    drawn = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:33]
    return [Encoded(ids.tolist(), 1 + len(ids) // 3) for ids in drawn.split([7, 3, 12, 2, 9])]


@pytest.mark.usefixtures("packed_line")
@pytest.mark.parametrize("architecture", FAMILIES)
def test_packed_and_padded_rows_have_the_same_logits_and_gradients(architecture):
    model = families.model(architecture)
    # transformers computes Gemma's norms in float32, and Gemma 2's attention.
    tolerance = 1e-4 if "Gemma" in architecture else 1e-10
    found = []
    for batch in (pack(long_rows()), collate(long_rows())):
        logits, tokens = answer_logits(model, batch), answer_tokens(batch)
        loss = cross_entropy(logits, tokens, reduction="sum")
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        found.append([logits[tokens.argsort()], *gradients])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@torch.no_grad()
@pytest.mark.usefixtures("packed_line")
@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_packed_row_sees_no_other_row(architecture):
    model, rows = families.model(architecture), long_rows()
    before = pack(rows)
    for changed in range(len(rows)):
        other = [*rows]
        ids, prompt_tokens, _ = rows[changed]
        other[changed] = Encoded([(i + 5) % 40 for i in ids], prompt_tokens)
        after = pack(other)
        same = before.input_ids == after.input_ids
        assert int((~same).sum()) == len(ids)
        logits = [
            model(b.input_ids, position_ids=b.position_ids, use_cache=False).logits
            for b in (before, after)
        ]
        torch.testing.assert_close(logits[1][same], logits[0][same], rtol=1e-12, atol=1e-12)
        assert not torch.isclose(logits[1][~same], logits[0][~same]).all()


def test_positions_and_tokens_match_row_by_row():
    batch = collate(ROWS)
    assert answer_places(batch).nonzero().tolist() == [[0, 3], [0, 4], [1, 0], [1, 1], [2, 2]]
    assert answer_tokens(batch).tolist() == [7, 8, 10, 11, 15]


def test_the_head_is_restored_even_after_an_error():
    model, batch = families.model("LlamaForCausalLM"), collate(ROWS)
    before = model(batch.input_ids).logits
    answer_logits(model, batch)
    batch.input_ids[0, 0] = 10_000
    with pytest.raises(IndexError):
        answer_logits(model, batch)
    batch.input_ids[0, 0] = 3
    assert torch.equal(model(batch.input_ids).logits, before)


def test_batches_by_length_hold_every_row_once_shortest_first():
    lengths = [5, 2, 9, 2, 7, 1, 3]
    batches = by_length(lengths, 3)
    assert batches == [[5, 1, 3], [6, 0, 4], [2]]


def gradients_and_saved_bytes(architecture, *, checkpointing):
    """Gradients of a training pass with dropout, and bytes saved for the backward pass."""
    model, batch = families.model(architecture).train(), collate(ROWS)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    saved = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in of_weights:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    of_weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with activation_checkpointing(model, checkpointing):
        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = answer_logits(model, batch).pow(2).sum()
        loss.backward()
    assert not model.is_activation_checkpointing
    return {n: p.grad for n, p in model.named_parameters()}, sum(saved.values())


@pytest.mark.parametrize("architecture", FAMILIES)
def test_activation_checkpointing_gives_the_same_gradients_with_less_memory(architecture):
    plain, kept = gradients_and_saved_bytes(architecture, checkpointing=False)
    again, kept_again = gradients_and_saved_bytes(architecture, checkpointing=True)
    assert kept_again < 0.6 * kept
    for name, gradient in plain.items():
        assert torch.equal(again[name], gradient), name


@pytest.mark.parametrize(
    ("architecture", "other"), [("LlamaForCausalLM", "sdpa"), ("Gemma2ForCausalLM", "eager")]
)
def test_flash_attention_is_replaced_where_float32_may_come(architecture, other, monkeypatch):
    """By what the family has: Gemma 2 has no sdpa. Restored after an error too."""
    model, chosen = families.model(architecture, dtype=torch.float32), []
    monkeypatch.setattr(model, "set_attn_implementation", chosen.append)
    with any_dtype_attention(model):
        assert not chosen
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(KeyboardInterrupt), any_dtype_attention(model):
        raise KeyboardInterrupt
    assert chosen == [other, "flash_attention_2"]
