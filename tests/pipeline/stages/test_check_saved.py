"""The saved folder is opened as a user opens it: its tokens and its answers are those scored."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from reference.sums import ANSWERS, QUESTIONS, base_folder
from reference.variants import slow
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from agcl.lrp.families import FAMILIES
from agcl.model import models

QUICK = ("LlamaForCausalLM", "GPT2LMHeadModel", "Gemma3ForCausalLM")
"""The others are in slow tests."""


@pytest.mark.parametrize(
    "architecture",
    [*QUICK, *slow(*(f for f in FAMILIES if f not in QUICK))],
)
def test_plain_generate_from_the_final_folder_answers_as_scored(trained, tmp_path, architecture):
    resolved = trained(base_folder(tmp_path / "base", architecture))
    scored = resolved["evaluate/1-sums"]
    assert json.loads(scored.read("saved.json")) == {"rows": 6, "agree": 6}
    folder = tmp_path / "storage" / "base" / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    right = 0
    for question, answer in zip(QUESTIONS, ANSWERS, strict=True):
        ids = tokenizer(question, return_tensors="pt")["input_ids"]
        out = model.generate(ids, do_sample=False, max_new_tokens=30)[0, ids.shape[1] :]
        right += out[-1] == tokenizer.eos_token_id and tokenizer.decode(out[:-1]) == answer
    assert right / 6 == json.loads(scored.read("scores.json"))["sums"]["memorization"] > 0.5


@pytest.mark.parametrize("chat", [*slow(False), True])
def test_rows_of_another_models_tokenizer_are_not_reused(trained, tmp_path, chat):
    """Byte-equal tokenizer files, which transformers opens by another class for Qwen2."""
    gpt2 = trained(base_folder(tmp_path / "gpt2", "GPT2LMHeadModel"), chat=chat)
    qwen2 = trained(base_folder(tmp_path / "qwen2", "Qwen2ForCausalLM"), chat=chat)
    counts = [
        json.loads(run["prepare/sums"].read("summary.json"))["splits"]["train"]["tokens"]
        for run in (gpt2, qwen2)
    ]
    assert counts[0] < counts[1]


def test_an_adapter_is_checked_on_its_base(trained, tmp_path):
    base = base_folder(tmp_path / "base", "Qwen2ForCausalLM")
    resolved = trained(base, method="lora", adapter={"rank": 8, "merge": False})
    assert json.loads(resolved["evaluate/1-sums"].read("saved.json")) == {"rows": 6, "agree": 6}


@pytest.mark.parametrize(
    "dtype",
    [
        torch.bfloat16,
        *slow(torch.float32, torch.float16),
    ],
)
def test_the_final_folder_can_be_copied_and_has_the_bases_dtype(trained, tmp_path, dtype):
    resolved = trained(base_folder(tmp_path / "base", "LlamaForCausalLM", dtype))
    shutil.copytree(tmp_path / "storage" / "base" / "model", tmp_path / "copy", symlinks=True)
    shutil.rmtree(tmp_path / "storage" / "base")
    stored = resolved["train/1-sums"].folder / "model.safetensors"
    assert stored.stat().st_nlink == 1
    saved = AutoModelForCausalLM.from_pretrained(resolved["train/1-sums"].folder)
    copied = AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
    for name, weight in copied.named_parameters():
        assert weight.dtype == dtype
        assert torch.equal(saved.get_parameter(name).to(dtype), weight)
        assert saved.get_parameter(name).dtype == torch.float32
    card = (tmp_path / "copy" / "README.md").read_text()
    assert ("stored in bfloat16" in card) == (dtype == torch.bfloat16)


@pytest.mark.slow
def test_weights_are_not_stored_twice_where_that_can_be_avoided(trained, tmp_path, monkeypatch):
    resolved = trained(base_folder(tmp_path / "base", "LlamaForCausalLM"))
    stored = resolved["train/1-sums"].folder
    final = tmp_path / "storage" / "base" / "model"
    assert (final / "model.safetensors").samefile(stored / "model.safetensors")
    assert not (final / "config.json").samefile(stored / "config.json")  # It may be edited.

    def no_links(self, target):
        raise OSError

    monkeypatch.setattr("pathlib.Path.hardlink_to", no_links)
    shutil.rmtree(final.parent)
    trained(tmp_path / "base")
    assert not (final / "model.safetensors").samefile(stored / "model.safetensors")
    assert AutoModelForCausalLM.from_pretrained(final)


def test_a_tokenizer_that_gives_other_tokens_fails_the_stage(trained, tmp_path, monkeypatch):
    base = base_folder(tmp_path / "base", "Qwen2ForCausalLM")
    plain = AutoTokenizer.from_pretrained(base_folder(tmp_path / "gpt2", "GPT2LMHeadModel"))
    only_there = SimpleNamespace(load_tokenizer=lambda folder: plain)
    monkeypatch.setattr("pipeline.stages.prepare.models", only_there)
    with pytest.raises(ValueError, match=r"task sums, row 1: .* prepared with token ids \["):
        trained(base)


def test_saved_weights_that_answer_otherwise_fail_the_stage(trained, tmp_path, monkeypatch):
    def save_half(model, tokenizer, folder, save=models.save, **options):
        save(model, tokenizer, folder, **options)
        weights = load_file(folder / "model.safetensors")
        halved = {name: weight.flip(0) for name, weight in weights.items()}
        save_file(halved, folder / "model.safetensors", metadata={"format": "pt"})

    base = base_folder(tmp_path / "base", "LlamaForCausalLM")
    monkeypatch.setattr("pipeline.stages.train.models.save", save_half)
    with pytest.raises(ValueError, match=r"generate\(\) disagrees on 6 of 6 rows, such as 'What"):
        trained(base)
