"""The importance file round-trips, and an invalid file is named in the error."""

import json
import os
from dataclasses import replace

import pytest
import torch
from reference import tiny
from reference.moments import whole
from safetensors.torch import save_file

from agcl.attribution import attribute
from agcl.errors import InputError
from agcl.files import tensor_file
from agcl.importance import Importance, check_file
from agcl.lrp import attributed_linears
from agcl.tasks.batches import collate


def assert_close(found, expected):
    """Equal but for the rounding of directions to float16; orthonormal nevertheless."""
    assert found.trace == expected.trace
    assert torch.equal(found.energies, expected.energies)
    columns = found.directions.shape[1]
    torch.testing.assert_close(found.directions.T @ found.directions, torch.eye(columns))
    scale = float(expected.energies[0])
    torch.testing.assert_close(found.matrix(), expected.matrix(), rtol=0, atol=2e-3 * scale)


def small():
    entries = {"a.weight": torch.tensor([[1.5, -2.0], [0.0, 0.25], [8.0, -0.5]]).T}
    moments = {"a.weight": whole(torch.tensor([[1.0, 1e-7], [1e-7, 3.1415927]]))}
    return Importance(entries, moments, {"rules": "attnlrp", "top_k": None, "rows": 3})


def test_entries_moments_and_header_round_trip(tmp_path):
    saved = small()
    saved.save(tmp_path / "importance.safetensors")
    loaded = Importance.load(tmp_path / "importance.safetensors")
    assert list(loaded.entries) == list(loaded.moments) == ["a.weight"]
    assert torch.equal(loaded.entries["a.weight"].float(), saved.entries["a.weight"])
    assert_close(loaded.moments["a.weight"], saved.moments["a.weight"])
    assert loaded.header == saved.header
    assert [f.name for f in tmp_path.iterdir()] == ["importance.safetensors"]


def test_entries_are_rounded_to_bfloat16_and_directions_to_float16(tmp_path, llama):
    rows = tiny.answered_rows(llama, 4)
    made = attribute(llama, [collate(rows)], moments="relevance")
    made.save(tmp_path / "file")
    loaded = Importance.load(tmp_path / "file")
    for name, entries in made.entries.items():
        assert torch.equal(loaded.entries[name], entries.bfloat16()), name
    assert loaded.inputs == made.inputs
    for name, moment in made.moments.items():
        assert_close(loaded.moments[name], moment)
    assert loaded.header == made.header
    check_file(tmp_path / "file", attributed_linears(llama))


def test_moments_may_be_absent(tmp_path):
    Importance({"a": torch.ones(1, 2)}).save(tmp_path / "file")
    loaded = Importance.load(tmp_path / "file")
    assert not loaded.moments
    assert loaded.header == {}


def test_entries_may_be_absent(tmp_path):
    Importance({}, small().moments).save(tmp_path / "file")
    loaded = Importance.load(tmp_path / "file")
    assert (dict(loaded.entries), loaded.weights) == ({}, ["a.weight"])
    assert not loaded.is_zero()
    assert Importance({}, {"a.weight": whole(torch.zeros(2, 2))}).is_zero()


def test_a_failed_save_keeps_the_earlier_file(tmp_path, monkeypatch):
    file = tmp_path / "importance.safetensors"

    def disk_full(tensors, path, metadata):
        save_file(tensors, path, metadata=metadata)
        os.truncate(path, 20)
        raise OSError("No space left on device")

    monkeypatch.setattr(tensor_file, "save_file", disk_full)
    with pytest.raises(OSError, match="No space"):
        small().save(file)
    assert not file.exists()

    monkeypatch.undo()
    small().save(file)
    before = file.read_bytes()
    monkeypatch.setattr(tensor_file, "save_file", disk_full)
    with pytest.raises(OSError, match="No space"):
        Importance({"b": torch.ones(2, 2)}).save(file)
    assert file.read_bytes() == before


def test_a_missing_file_is_named(tmp_path):
    for call in (Importance.load, lambda file: check_file(file, {})):
        with pytest.raises(InputError, match=r"gone\.safetensors"):
            call(tmp_path / "gone.safetensors")
        with pytest.raises(InputError, match=tmp_path.name):
            call(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 30, -1])
def test_a_truncated_file_is_named(tmp_path, keep):
    file = tmp_path / "cut.safetensors"
    small().save(file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"cut\.safetensors"):
        Importance.load(file)


def test_a_flipped_byte_of_the_header_never_escapes_as_another_error(tmp_path):
    """Either the error names the file, or it still is a file of tensors."""
    file = tmp_path / "flipped.safetensors"
    small().save(file)
    content = file.read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    refused = 0
    for place in range(length):
        broken = bytearray(content)
        broken[place] ^= 0x11
        file.write_bytes(broken)
        try:
            Importance.load(file)
        except InputError as error:
            refused += "flipped.safetensors" in str(error)
    assert refused > length / 2


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_another_safetensors_file_is_refused(tmp_path, metadata):
    file = tmp_path / "model.safetensors"
    save_file({"a.weight": torch.ones(2)}, file, metadata=metadata)
    for call in (Importance.load, lambda file: check_file(file, {})):
        with pytest.raises(InputError, match=r"model\.safetensors.*not an agcl importance file"):
            call(file)


@pytest.mark.parametrize(
    ("other", "tensor"),
    [
        ({"layers": 3}, "model.layers.2.self_attn.q_proj.weight"),
        ({"layers": 1}, "model.layers.1."),
        ({"kv_heads": 4}, "model.layers.0.self_attn.k_proj.weight"),
        ({"width": 32}, "model.layers.0.self_attn.q_proj.weight"),
    ],
)
def test_importance_of_another_model_is_refused_with_file_and_tensor(
    tmp_path, llama, other, tensor
):
    file = tmp_path / "importance.safetensors"
    entries = {n: torch.ones_like(m.weight) for n, m in attributed_linears(llama).items()}
    Importance(entries).save(file)
    check_file(file, attributed_linears(llama))
    with pytest.raises(InputError) as raised:
        check_file(file, attributed_linears(tiny.llama(**other)))
    assert str(file) in str(raised.value)
    assert tensor in str(raised.value)


def test_zero_importance_is_recognized():
    assert Importance({"a": torch.zeros(2, 2), "b": torch.zeros(1)}).is_zero()
    assert not Importance({"a": torch.zeros(2, 2), "b": torch.tensor([0.0, -1e-9])}).is_zero()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_values_are_named(value):
    good, bad = torch.zeros(2, 2), torch.tensor([[0.0, value]])
    Importance({"a": good}, {"a": whole(good)}).check_finite()
    with pytest.raises(ValueError, match=r"b\.weight"):
        Importance({"a": good, "b.weight": bad}).check_finite()
    with pytest.raises(ValueError, match=r"b\.weight"):
        Importance({"a": good}, {"b.weight": replace(whole(good), energies=bad[0])}).check_finite()


def test_header_is_json(tmp_path, llama):
    made = attribute(llama, [collate(tiny.answered_rows(llama, 2))], top_k=None, rules="cp")
    assert json.loads(json.dumps(made.header)) == made.header
    assert made.header["architecture"] == "LlamaForCausalLM"
    assert made.header["rules"] == "cp"
    assert made.header["top_k"] is None


def test_a_file_without_the_requested_parts_or_with_foreign_moments_is_refused(tmp_path, llama):
    file = tmp_path / "importance.safetensors"
    linears = attributed_linears(llama)
    moments = {n: whole(torch.eye(m.weight.shape[1])) for n, m in linears.items()}
    Importance({}, moments).save(file)
    check_file(file, linears, entries=False, moments=True)
    with pytest.raises(InputError, match=f"{file}: no relevance of single weights"):
        check_file(file, linears)
    others = attributed_linears(tiny.llama(width=32))
    with pytest.raises(InputError, match=r"another model .*layers\.0\.self_attn\.q_proj"):
        check_file(file, others, entries=False, moments=True)
    Importance({n: torch.ones_like(m.weight) for n, m in linears.items()}).save(file)
    with pytest.raises(InputError, match=f"{file}: no input moments"):
        check_file(file, linears, entries=False, moments=True)


def test_a_file_that_was_measured_otherwise_is_refused(tmp_path):
    file = tmp_path / "importance.safetensors"
    linears = {"a.weight": torch.nn.Linear(2, 3)}
    moments = {"a.weight": whole(torch.eye(2))}
    Importance({}, moments, {"unit_inputs": False}).save(file)
    options = {"entries": False, "moments": True}
    check_file(file, linears, **options, measured_with={"unit_inputs": False})
    check_file(file, linears, **options, measured_with={"estimator": "lrp"})  # The file is silent.
    said = f"{file}: measured with unit_inputs=False, the config has True$"
    with pytest.raises(InputError, match=said):
        check_file(file, linears, **options, measured_with={"unit_inputs": True})
