"""The saved folder is opened as a user opens it: its tokens and its answers are those scored."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from reference import families
from reference.record_run import recorded
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from agcl.lrp.families import FAMILIES
from agcl.model import models
from pipeline.config.check import check_inputs
from pipeline.config.loading import validate
from pipeline.execution.session import run_stages
from pipeline.results.model_card import write_model_folder
from pipeline.run import open_run
from pipeline.stages.context import Context

CHAT = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "
QUESTIONS = [f"What is {i} and {i + 30}?" for i in range(6)]
ANSWERS = [f" the number {31 * i}" for i in range(6)]


def base_folder(folder, architecture, dtype=torch.float32):
    """A tiny model of the family beside a plain byte-level tokenizer, which merges digits."""
    texts = [q + a for q, a in zip(QUESTIONS, ANSWERS, strict=True)]
    tokenizer = models.builtin_tokenizer(texts * 4, vocab_size=300)
    tokenizer.chat_template = CHAT
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "initializer_range": 0.1}
    model = families.model(architecture, dtype=dtype, eos_token_id=0, **sizes)
    models.save(model, tokenizer, folder)
    return folder


@pytest.fixture
def trained(tmp_path):
    """Runs one task on a base folder without Ray, in the test's own storage; the final folder."""

    def run(base, *, chat=False, **sections):
        lines = [
            json.dumps({"q": q, "a": a}) + "\n" for q, a in zip(QUESTIONS, ANSWERS, strict=True)
        ]
        (tmp_path / "rows.jsonl").write_text("".join(lines))
        item = {"name": "sums", "train": str(tmp_path / "rows.jsonl")}
        item |= {"prompt": "{q}", "answer": "{a}"}
        config = validate(
            {
                "name": base.name,
                "storage": str(tmp_path / "storage"),
                "method": "sequential",
                "model": {"path": str(base)},
                "tasks": {"format": "jsonl", "sequence": [item], "chat_template": chat},
                "training": {"epochs": 60, "batch_size": 6, "learning_rate": 1e-2},
                **sections,
            }
        )
        check_inputs(config)
        opened = open_run(config)
        works = list(opened.resolved.values())
        run_stages(works, Context(ray_data=False), lambda records: None)
        opened.folder.mkdir()
        write_model_folder(opened, recorded("gate-seed0"), None)
        return opened.resolved

    return run


@pytest.mark.parametrize("architecture", FAMILIES)
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


@pytest.mark.parametrize("chat", [False, True])
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
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
