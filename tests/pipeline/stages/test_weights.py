"""What base folders and `model` settings may be: dtypes, attention, and how weights are stored."""

import json

import pytest
import torch
from reference import sums
from reference.sums import ANSWERS, QUESTIONS, base_folder
from reference.variants import slow
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from agcl.errors import InputError
from agcl.model import models
from pipeline.config import check
from pipeline.config.loading import validate
from pipeline.config.method import Adapter, Base, Subspace
from pipeline.plan.plan import plan
from pipeline.plan.stage import resolve

LLAMA = "LlamaForCausalLM"


def answers(folder):
    """Which of the questions plain transformers answers from a folder."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    said = []
    for question, answer in zip(QUESTIONS, ANSWERS, strict=True):
        ids = tokenizer(question, return_tensors="pt")["input_ids"]
        out = model.generate(ids, do_sample=False, max_new_tokens=30)[0, ids.shape[1] :]
        said.append(out[-1] == tokenizer.eos_token_id and tokenizer.decode(out[:-1]) == answer)
    return said


def dtypes(folder):
    files = map(load_file, folder.glob("*.safetensors"))
    return {tensor.dtype for weights in files for tensor in weights.values()}


@pytest.mark.parametrize(
    ("stored", "asked", "sections"),
    [
        (torch.float32, "bfloat16", {"training": {"epochs": 40, "learning_rate": 1e-2}}),
        pytest.param(torch.bfloat16, "auto", {"method": "freeze"}, marks=pytest.mark.slow),
        (torch.bfloat16, "bfloat16", {"method": "lora", "adapter": {"rank": 8, "merge": True}}),
    ],
)
def test_weights_train_in_bfloat16_and_are_saved_in_the_bases_dtype(
    trained, tmp_path, stored, asked, sections
):
    base = base_folder(tmp_path / "base", LLAMA, stored)
    sections = {"protect": [], "base": {"protect": "none"}, **sections}
    resolved = trained(base, model={"path": str(base), "dtype": asked}, **sections)
    model = resolved["train/1-sums"].folder
    assert dtypes(model) == {torch.bfloat16}
    assert json.loads((model / "config.json").read_text())["dtype"] == "bfloat16"
    final = tmp_path / "storage" / "base" / "model"
    assert dtypes(final) == {stored}
    assert json.loads((final / "config.json").read_text())["dtype"] == str(stored)[6:]
    scored = json.loads(resolved["evaluate/1-sums"].read("scores.json"))["sums"]["memorization"]
    assert scored > 0.5
    assert abs(sum(answers(final)) / 6 - scored) <= 1 / 6  # Ties of bfloat16.
    said = "stored in float32" if stored == torch.float32 else "The weights are stored in"
    assert (said in (final / "README.md").read_text()) == (stored == torch.float32)


def test_factors_are_float32_on_a_bfloat16_base(trained, tmp_path):
    base = base_folder(tmp_path / "base", LLAMA, torch.bfloat16)
    lora = {"method": "lora", "adapter": {"rank": 8, "merge": False}, "protect": []}
    resolved = trained(base, model={"path": str(base), "dtype": "auto"}, **lora)
    assert dtypes(resolved["train/1-sums"].folder / "adapter") == {torch.float32}
    saved = json.loads(resolved["evaluate/1-sums"].read("saved.json"))
    assert saved["agree"] >= saved["rows"] - 1


@pytest.fixture
def config(tmp_path):
    rows = [json.dumps({"q": q, "a": a}) for q, a in zip(QUESTIONS, ANSWERS, strict=True)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))

    def make(base, method="sequential", training=None, importance=None, **model):
        item = {"name": "sums", "train": str(tmp_path / "rows.jsonl")}
        item |= {"prompt": "{q}", "answer": "{a}"}
        return validate(
            {
                "storage": str(tmp_path / "storage"),
                "method": method,
                "protect": [{"kind": "gate"}] if method == "agcl" else [],
                "model": {"path": str(base), **model},
                "tasks": {"format": "jsonl", "sequence": [item]},
                "training": training or {},
                "importance": importance or {},
            }
        )

    return make


def test_only_what_changes_numbers_changes_fingerprints(config, tmp_path):
    full = base_folder(tmp_path / "full", LLAMA)
    half = base_folder(tmp_path / "half", LLAMA, torch.bfloat16)

    def fingerprints(base, factors=None, **model):
        made = config(base, **model).model_copy(update=factors or {})
        return {n: s.fingerprint for n, s in resolve(plan(made).stages, made.storage).items()}

    default = fingerprints(full)
    assert fingerprints(full, dtype="auto", attention="sdpa") == default
    assert fingerprints(full, training={"rounding": "nearest"}) == default
    assert fingerprints(half, dtype="auto") == fingerprints(half, dtype="bfloat16")
    for changed in (fingerprints(full, dtype="bfloat16"), fingerprints(full, attention="eager")):
        same = {name for name in default if default[name] == changed[name]}
        assert same == {"prepare/sums"}
    stochastic = fingerprints(full, dtype="bfloat16")
    nearest = fingerprints(full, dtype="bfloat16", training={"rounding": "nearest"})
    same = {name for name in stochastic if stochastic[name] == nearest[name]}
    assert same == {"prepare/sums", "evaluate/0-base"}
    # Factors are float32, so that it does not matter to them.
    for factors in ({"adapter": Adapter()}, {"subspace": Subspace()}):
        assert fingerprints(full, factors, dtype="bfloat16") == fingerprints(
            full, factors, dtype="bfloat16", training={"rounding": "nearest"}
        )


def test_bfloat16_weights_are_attributed_without_a_copy_if_that_may_round(config, tmp_path):
    full = base_folder(tmp_path / "full", LLAMA)

    def loaded(dtype, precision):
        made = config(full, "agcl", dtype=dtype, importance={"precision": precision})
        stages = [s for s in plan(made).stages if s.name.startswith("attribute/")]
        return [stage.config["loading"]["dtype"] for stage in stages]

    assert loaded("float32", "bfloat16") == loaded("bfloat16", "float32") == ["float32"]
    assert loaded("bfloat16", "bfloat16") == ["bfloat16"]


@pytest.mark.parametrize(
    ("stored", "method", "model", "said"),
    [
        (
            "float32",
            "agcl",
            {"dtype": "bfloat16", "training": {"rounding": "nearest"}},
            "nearest would undo the protection of bfloat16 weights",
        ),
        (
            "bfloat16",
            "agcl",
            {"dtype": "auto", "training": {"rounding": "nearest"}},
            "nearest would undo the protection of bfloat16 weights",
        ),
        ("float16", "sequential", {"dtype": "auto"}, "auto is float16 for "),
        (
            "float32",
            "sequential",
            {"attention": "flash_attention_2"},
            "needs the package flash",
        ),
    ],
)
def test_what_weights_are_too_coarse_for_is_refused(config, tmp_path, stored, method, model, said):
    base = base_folder(tmp_path / "base", LLAMA, getattr(torch, stored))
    with pytest.raises(InputError, match=rf"^(model|training)\.\w+: .*{said}"):
        check.check_inputs(config(base, method, **model))


@pytest.mark.parametrize("factors", [{"adapter": Adapter()}, {"subspace": Subspace()}])
def test_8bit_adam_trains_float32_factors_whatever_the_rounding_of_weights(
    config, tmp_path, factors
):
    training = {"rounding": "nearest", "optimizer": "adamw_8bit"}
    made = config(base_folder(tmp_path / "base", LLAMA), training=training, dtype="bfloat16")
    with pytest.raises(InputError, match="nearest cannot be combined with"):
        check.check_inputs(made)
    check.check_inputs(made.model_copy(update=factors))


def test_osf_of_weights_stored_transposed_is_refused_before_any_work(config, tmp_path):
    made = config(base_folder(tmp_path / "base", "GPT2LMHeadModel"))
    made = made.model_copy(update={"method": "osf", "subspace": Subspace()})
    with pytest.raises(InputError, match=r"^subspace: GPT2LMHeadModel stores its weights as"):
        check.check_inputs(made)


def test_corda_of_too_coarse_or_too_narrow_weights_is_refused_before_any_work(config, tmp_path):
    base, half = (
        base_folder(tmp_path / str(dtype), LLAMA, dtype)
        for dtype in (torch.float32, torch.bfloat16)
    )
    narrow = min(
        min(p.shape) for n, p in models.load_model(base).named_parameters() if "_proj" in n
    )
    for folder, rank, said in (
        (base, narrow + 1, rf"^adapter\.rank: {narrow + 1} is more than {narrow}, the"),
        (half, narrow, r"^adapter\.init: corda needs weights in float32"),
    ):
        sections = {"adapter": Adapter(init="corda", rank=rank), "base": Base(protect="self")}
        made = config(folder, dtype="auto").model_copy(update=sections)
        with pytest.raises(InputError, match=said):
            check.check_inputs(made)
    check.check_inputs(made.model_copy(update={"model": config(base).model}))


def test_flash_attention_needs_a_gpu_and_half_precision(config, tmp_path, monkeypatch):
    monkeypatch.setattr(check, "find_spec", lambda name: True)
    made = config(base_folder(tmp_path / "base", LLAMA), attention="flash_attention_2")
    with pytest.raises(InputError, match="needs a GPU"):
        check.check_inputs(made)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    resources = made.resources.model_copy(update={"gpus_per_worker": 1})
    with pytest.raises(InputError, match=r"half precision \(training.precision=bfloat16 and eval"):
        check.check_inputs(made.model_copy(update={"resources": resources}))


@pytest.mark.parametrize("key", ["dtype", "attention"])
def test_the_builtin_model_is_as_it_is(key):
    values = {"dtype": "bfloat16", "attention": "eager"}
    with pytest.raises(
        InputError, match=f"^model.{key}: the builtin model has float32 weights and sdpa"
    ):
        validate({"model": {key: values[key]}})


def test_eager_attention_gives_the_same_logits(tmp_path):
    folder = base_folder(tmp_path, LLAMA)
    ids = torch.arange(2, 12)[None]
    one, other = (models.load_model(folder, attention=name) for name in ("sdpa", "eager"))
    assert one.config._attn_implementation.endswith("sdpa")
    assert other.config._attn_implementation == "eager"
    with torch.no_grad():
        assert torch.allclose(one(ids).logits, other(ids).logits, atol=1e-5)


def resized(folder):
    """Embeddings that were resized to a multiple of 64, as training scripts do."""
    model = sums.model(LLAMA)
    model.resize_token_embeddings(pad_to_multiple_of=64)
    models.save(model, sums.tokenizer(), folder)


def tied(folder):
    models.save(sums.model(LLAMA, tie_word_embeddings=True), sums.tokenizer(), folder)


def sharded(folder):
    """Several weight files and an index."""
    model = sums.model(LLAMA)
    models.save(model, sums.tokenizer(), folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="50KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1


def with_added_tokens(folder):
    """Tokens that were added after the tokenizer was trained, and used in every answer."""
    tokenizer = sums.tokenizer()
    tokenizer.add_tokens([" the number", "<note>"])
    models.save(sums.model(LLAMA, more_tokens=2), tokenizer, folder)


def without_a_pad_token(folder):
    """As Llama's and GPT-2's tokenizers are."""
    models.save(sums.model(LLAMA, pad_token_id=None), sums.tokenizer(), folder)
    file = folder / "tokenizer_config.json"
    keys = {k: v for k, v in json.loads(file.read_text()).items() if k != "pad_token"}
    file.write_text(json.dumps(keys))
    assert AutoTokenizer.from_pretrained(folder).pad_token is None


def snapshot(folder):
    """Links into another folder, named by content, as the hub's cache has them."""
    base_folder(folder, LLAMA)
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(f"../blobs/{number}")


@pytest.mark.parametrize(
    "make",
    [
        snapshot,
        *slow(with_added_tokens, resized, tied),
        *slow(sharded, without_a_pad_token),
    ],
)
def test_folders_as_users_have_them_train_and_are_saved_whole(trained, tmp_path, make):
    base = tmp_path / "base"
    make(base)
    resolved = trained(base)
    scored = json.loads(resolved["evaluate/1-sums"].read("scores.json"))["sums"]["memorization"]
    assert json.loads(resolved["evaluate/1-sums"].read("saved.json")) == {"rows": 6, "agree": 6}
    final = tmp_path / "storage" / "base" / "model"
    assert sum(answers(final)) / 6 == scored > 0.5
    before, after = (AutoModelForCausalLM.from_pretrained(each) for each in (base, final))
    shapes = [{n: p.shape for n, p in each.named_parameters()} for each in (before, after)]
    assert shapes[0] == shapes[1]
    one, other = (AutoTokenizer.from_pretrained(each) for each in (base, final))
    assert one.get_vocab() == other.get_vocab()
    assert one.pad_token == other.pad_token
    assert before.config.tie_word_embeddings == after.config.tie_word_embeddings
    assert not any(file.is_symlink() for file in final.iterdir())
    assert "are stored in" not in (final / "README.md").read_text()
