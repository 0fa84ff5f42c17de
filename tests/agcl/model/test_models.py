"""The built-in model, folders that transformers can load, and checks before loading."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from agcl.errors import InputError
from agcl.lrp import attributed_linears, relevance_backward
from agcl.model import models
from agcl.model.builtin import builtin_model, builtin_tokenizer
from agcl.model.check import check_folder
from agcl.tasks import Row, encode

TEXTS = ["Question: Where does Bako live?\nShort answer: Rome", "Who is Tola?"] * 3


@pytest.fixture(scope="module")
def tokenizer():
    return builtin_tokenizer(TEXTS, vocab_size=300)


@pytest.fixture(scope="module")
def model(tokenizer):
    return builtin_model(len(tokenizer), seed=0)


@pytest.fixture
def folder(tmp_path, model, tokenizer):
    models.save(model, tokenizer, tmp_path / "model")
    return tmp_path / "model"


def test_the_builtin_tokenizer_is_deterministic_and_encodes_any_text(tokenizer):
    again = builtin_tokenizer(iter(TEXTS), vocab_size=300)
    assert again.get_vocab() == tokenizer.get_vocab()
    for text in ("Rome", " Žofie 🦔\n\t漢字", "", "<<end>"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token_id is not None
    assert tokenizer.eos_token_id != tokenizer.pad_token_id


def test_the_builtin_model_depends_only_on_its_seed(model, tokenizer):
    torch.manual_seed(99)
    state = torch.get_rng_state()
    same, other = (builtin_model(len(tokenizer), seed=s) for s in (0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    pairs = list(zip(model.parameters(), same.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(other.lm_head.weight, model.lm_head.weight)


def test_the_builtin_model_can_be_attributed_and_has_its_tokenizers_end_token(model, tokenizer):
    with relevance_backward(model):
        assert len(attributed_linears(model)) == 4 * 7
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id


def test_a_saved_folder_loads_with_plain_transformers(folder, model, tokenizer):
    assert check_folder(folder).get_vocab() == tokenizer.get_vocab()
    loaded, words = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    ids = torch.tensor([tokenizer(TEXTS[0])["input_ids"]])
    assert words(TEXTS[0])["input_ids"] == ids[0].tolist()
    assert words.eos_token_id == tokenizer.eos_token_id
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize(("end", "samples"), [(None, None), (3, True)])
def test_sampling_settings_without_sampling_do_not_stop_a_save(tmp_path, tokenizer, end, samples):
    """As older checkpoints have them: transformers saves them only as long as nothing changes."""
    model = builtin_model(len(tokenizer), seed=0)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    model.generation_config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "generation_config.json").read_text())
    (tmp_path / "generation_config.json").write_text(json.dumps(written | {"temperature": 0.6}))
    model.generation_config = GenerationConfig.from_pretrained(tmp_path)
    models.save(model, tokenizer, tmp_path / "saved", end=end)
    found = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert (found["temperature"], found.get("do_sample")) == (0.6, samples)


@pytest.mark.parametrize(("known", "saved"), [(0, 1), ([0, 1, 5], [1, 0, 5]), (None, 1), ([1], 1)])
def test_a_saved_model_stops_at_the_tokenizers_end_token(tmp_path, tokenizer, known, saved):
    model = builtin_model(len(tokenizer), seed=0)
    model.config.eos_token_id = model.generation_config.eos_token_id = known
    models.save(model, tokenizer, tmp_path)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / name).read_text())["eos_token_id"] == saved


LLAMA = """{%- if strftime_now is defined %}{%- set day = strftime_now("%d %b %Y") %}
{%- else %}{%- set day = "none" %}{%- endif %}
{%- for message in messages %}{{ day }}: {{ message.content }}{% endfor %}"""


@pytest.mark.parametrize("template", [LLAMA, {"default": LLAMA, "tool_use": "{{ messages }}"}])
def test_a_chat_template_never_prints_todays_date(folder, model, tmp_path, template):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    models.save(model, models.load_tokenizer(folder), tmp_path / "trained")
    opened = (models.load_tokenizer(folder), AutoTokenizer.from_pretrained(tmp_path / "trained"))
    for each in (*opened, models.load_tokenizer(tmp_path / "trained")):
        table = encode(each, [Row("Hi?", " Yes")], chat=True)
        assert table["prompt"].to_pylist() == ["26 Jul 2024: Hi?"]


def test_a_folder_loads_in_float32_whatever_its_dtype(tmp_path, tokenizer):
    half = builtin_model(len(tokenizer), seed=0).bfloat16()
    models.save(half, tokenizer, tmp_path)
    loaded = models.load_model(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    for name, weight in half.named_parameters():
        assert torch.equal(loaded.get_parameter(name), weight.float()), name
    assert models.load_tokenizer(tmp_path).get_vocab() == tokenizer.get_vocab()


def test_an_empty_model_has_the_names_and_shapes_and_no_memory(folder, model):
    empty = models.empty_model(folder)
    shapes = {name: p.shape for name, p in empty.named_parameters()}
    assert shapes == {name: p.shape for name, p in model.named_parameters()}
    assert all(p.is_meta for p in empty.parameters())
    assert list(attributed_linears(empty)) == list(attributed_linears(model))


def change_config(folder, **keys):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(InputError, match=r"no folder .*gone"):
        check_folder(tmp_path / "gone")


@pytest.mark.parametrize(
    ("lacks", "reason"),
    [
        ("config.json", "no config.json"),
        ("model.safetensors", "no weights"),
        ("tokenizer.json", "no tokenizer"),
    ],
)
def test_a_folder_without_a_needed_file_is_refused(folder, lacks, reason):
    (folder / lacks).unlink()
    with pytest.raises(InputError, match=rf"{folder}.*{reason}"):
        check_folder(folder)


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe{}", b""])
def test_a_config_other_than_a_json_object_is_refused(folder, content):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=r"config\.json is not a JSON object"):
        check_folder(folder)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"architectures": ["BloomForCausalLM"]}, "BloomForCausalLM is not supported"),
        ({"architectures": []}, "not supported"),
        ({"architectures": None}, "not supported"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
    ],
)
def test_a_model_that_cannot_be_attributed_is_refused(folder, keys, reason):
    change_config(folder, **keys)
    with pytest.raises(InputError, match=rf"{folder}.*{reason}"):
        check_folder(folder)


@pytest.mark.parametrize(
    "values",
    [
        {"hidden_size": "x"},
        {"model_type": ["llama"]},
        {"model_type": "nope"},
        {"num_attention_heads": 0},
        {"rope_scaling": 5},
        {"vocab_size": -4},
        {"hidden_size": 1e30},
        {"num_hidden_layers": None},
        {"hidden_act": "nope"},
    ],
)
def test_an_invalid_config_is_refused_in_one_line(folder, values):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, **values}))
    with pytest.raises(InputError, match=r"cannot build a model from .*config\.json \(.+\)$"):
        check_folder(folder)


@pytest.mark.parametrize("lacks", ["up_proj", "embed_tokens"])
def test_incomplete_weights_are_refused(folder, model, lacks):
    kept = {k: v for k, v in load_file(folder / "model.safetensors").items() if lacks not in k}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    for read in (models.load_model, check_folder):
        with pytest.raises(InputError, match=r"lack \d of the model's parameters, such as \w+\."):
            read(folder)


@pytest.mark.parametrize("content", [b"", b"damaged" * 9, None])
def test_unreadable_weights_are_refused(folder, content):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100] if content is None else content)
    with pytest.raises(InputError, match=r"^cannot read the weights in .*\(.+\)$"):
        check_folder(folder)


@pytest.fixture
def sharded(folder, model):
    """The folder with its weights in several files and an index."""
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="1MB")
    return folder


@pytest.mark.parametrize("dangling", [True, False])
def test_a_missing_shard_is_named(sharded, dangling):
    check_folder(sharded)
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    if dangling:
        shard.symlink_to(sharded / "blobs" / "gone")
    with pytest.raises(InputError, match=rf"{shard}, named in .*leads nowhere$"):
        check_folder(sharded)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "model-00002-of-00004.safetensors"]
)
def test_a_git_lfs_pointer_is_named(sharded, name):
    (sharded / name).write_text(POINTER)
    (sharded / "pytorch_model.bin").write_text(POINTER)  # Not read.
    with pytest.raises(InputError, match=rf".*/{name} is a Git-LFS pointer.*lfs pull"):
        check_folder(sharded)


def test_a_tokenizer_with_more_tokens_than_the_embedding_is_refused(folder, tokenizer):
    size = len(tokenizer)
    more = AutoTokenizer.from_pretrained(folder)
    more.add_tokens(["<more>"])
    more.save_pretrained(folder)
    with pytest.raises(InputError, match=rf"has {size + 1} tokens, the model embeds only {size}$"):
        check_folder(folder)


@pytest.mark.parametrize("content", ["{}", "not JSON", '{"model": {"type": "nope"}}'])
def test_a_damaged_tokenizer_is_refused(folder, content):
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match=r"^no readable tokenizer in .*\(.+\)$"):
        check_folder(folder)


def test_a_tokenizer_without_an_end_token_is_refused(folder):
    file = folder / "tokenizer_config.json"
    keys = json.loads(file.read_text())
    file.write_text(json.dumps({**keys, "eos_token": None}))
    for name in ("special_tokens_map.json",):
        (folder / name).unlink(missing_ok=True)
    for read in (models.load_tokenizer, check_folder):
        with pytest.raises(InputError, match="no end-of-sequence"):
            read(folder)
