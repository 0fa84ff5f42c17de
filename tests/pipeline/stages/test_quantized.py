"""Runs on a base model in four bits; they need bitsandbytes, which `make install` leaves out."""

import json
from importlib.util import find_spec

import pytest
import torch
from reference.tiny import random_rows
from safetensors.torch import load_file

from agcl.attribution import attribute
from agcl.errors import InputError
from agcl.importance import Importance
from agcl.lrp import attributed_linears
from agcl.model import adapter, models
from agcl.tasks.batches import collate
from pipeline.config.check import check_inputs
from pipeline.estimate.setting import RowLength, Setting, model_parts
from pipeline.estimate.shape import shape_of

NF4 = ["model.quantization=nf4", "adapter.merge=false"]
needs_bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


@pytest.fixture(scope="module")
def base(run):
    """A given model's folder: the built-in one, pretrained."""
    return run(method="sequential")["pretrain"].folder


@pytest.mark.slow
def test_only_an_adapter_apart_can_be_trained_on_it(tiny_config, base, tmp_path):
    for method, settings in (("agcl", NF4[:1]), ("lora", NF4[:1]), ("olora", NF4[:1])):
        with pytest.raises(InputError, match="not merged"):
            tiny_config(tmp_path, f"model.path={base}", *settings, method=method)
    with pytest.raises(InputError, match="quantization: the builtin model has float32 weights"):
        tiny_config(tmp_path, *NF4, method="lora")


def test_a_missing_package_is_named(tiny_config, base, tmp_path, monkeypatch):
    config = tiny_config(tmp_path, f"model.path={base}", *NF4, method="lora")
    monkeypatch.setattr("pipeline.config.check.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'agcl\[quantization\]'"):
        check_inputs(config)


@needs_bitsandbytes
@pytest.mark.parametrize(
    ("method", "protect"), [("lora", "none"), ("lora_agcl", "none"), ("lora_agcl", "self")]
)
def test_a_run_learns_protects_and_leaves_an_adapter(run, base, method, protect):
    settings = ["training.learning_rate=5e-3", "evaluation.batch_size=8"]
    settings.append(f"base.protect={protect}")
    resolved = run(f"model.path={base}", *NF4, *settings, method=method)
    found = json.loads((resolved["report"].folder / "metrics.json").read_text())
    folder = resolved["train/2-valley"].folder
    assert found["learning_accuracy"] > 0.4
    assert not list(folder.glob("*.safetensors"))
    factors = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert {factor.dtype for factor in factors.values()} == {torch.float32}
    # The base model in four bits is compared with itself, with its adapter off.
    assert found["base"]["kl_answers"][-1] > 1e-3
    if method == "lora_agcl":
        assert json.loads((folder / "checks.json").read_text())
    if protect == "self":
        importance = Importance.load(resolved["attribute/0-base"].folder / "importance.safetensors")
        widths = {moment.directions.shape[0] for moment in importance.moments.values()}
        assert widths == {128, 352}


@needs_bitsandbytes
def test_the_plan_knows_the_size_of_a_base_in_four_bits(tiny_config, base, tmp_path):
    config = tiny_config(tmp_path, f"model.path={base}", *NF4, method="lora")
    model = models.load_model(base, quantization="nf4")
    scales = [p.quant_state for p in model.parameters() if hasattr(p, "quant_state")]
    held = [*model.parameters(), *(s.absmax for s in scales), *(s.state2.absmax for s in scales)]
    measured = sum(tensor.numel() * tensor.element_size() for tensor in held)
    setting = Setting(shape_of(models.empty_model(base)), config, RowLength(16, 4))
    predicted = model_parts(setting, gathered=False)[0].size
    assert predicted == pytest.approx(measured, rel=0.01)


@needs_bitsandbytes
def test_relevance_needs_no_weight_of_the_base(base):
    """That of the factors on a base in four bits is that on the same values in float32."""
    quantized, plain = models.load_model(base, quantization="nf4"), models.load_model(base)
    for name, layer in attributed_linears(quantized).items():
        values = layer(torch.eye(layer.in_features)).T
        plain.get_submodule(name.removesuffix(".weight")).weight.data.copy_(values)
    found = []
    for model in (quantized, plain):
        peft_model = adapter.attach(model, rank=3, alpha=6.0, seed=0)
        for name, factor in peft_model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(factor, std=0.02, generator=torch.manual_seed(1))
        batch = collate(random_rows(4))
        inner = peft_model.get_base_model()
        found.append(attribute(inner, [batch], moments="relevance", correct_only=False))
    one, other = (importance.entries for importance in found)
    assert one.keys() == other.keys()
    for name, entry in one.items():
        assert (entry - other[name]).norm() < 1e-3 * other[name].norm(), name
