"""Repeated keys and values where torch has no kernel for grouped heads."""

import json

import pytest
import torch
from reference import tiny
from transformers import AutoModelForCausalLM

from agcl.lrp import relevance_backward
from agcl.model import adapter, attention, models
from agcl.model.forward import autocast, compiled

IDS = torch.arange(2, 12).view(2, 5)


@pytest.fixture
def folder(tmp_path):
    tiny.llama().save_pretrained(tmp_path)
    return tmp_path


def passed(model):
    """Logits and gradients of a pass."""
    model.zero_grad()
    logits = model(IDS, use_cache=False).logits
    logits.sum().backward()
    return [logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def test_a_loaded_model_is_bit_equal_and_saved_as_before(folder):
    model = models.load_model(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert plain.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == "agcl_sdpa"
    for one, other in zip(passed(model), passed(plain), strict=True):
        assert torch.equal(one, other)
    with relevance_backward(model):
        pass
    assert model.config._attn_implementation == "agcl_sdpa"
    ids = torch.tensor([[0, 0, 3, 4], [5, 6, 7, 8]])  # Padded on the left: with a mask.
    options = {"attention_mask": (ids > 0).long(), "max_new_tokens": 3, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))
    model.save_pretrained(folder / "saved")
    assert "agcl" not in json.dumps(json.loads((folder / "saved/config.json").read_text()))
    peft_model = adapter.attach(model, rank=2, alpha=2, seed=0)
    assert passed(peft_model.get_base_model())


def test_repeated_keys_and_values_change_nothing(folder, monkeypatch):
    """As on a GPU in float32."""
    model = models.load_model(folder, dtype="float64")
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    attend, grouped = torch.nn.functional.scaled_dot_product_attention, []

    def seen(query, key, *args, **options):
        grouped.append(bool(options.get("enable_gqa")) or key.shape[1] < query.shape[1])
        return attend(query, key, *args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", seen)
    expected = passed(model)
    assert all(grouped)
    grouped.clear()
    monkeypatch.setattr(attention, "lacks_kernel", lambda query, key: True)
    torch.testing.assert_close(passed(model), expected)
    assert grouped
    assert not any(grouped)
    with compiled(model, backend="eager"):
        torch.testing.assert_close(passed(model), expected)
    grouped.clear()
    with autocast(model.device, "bfloat16"):
        passed(model)
    assert all(grouped), "autocast rounds for a kernel that takes groups"
