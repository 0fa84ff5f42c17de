"""What a pass keeps in memory, by the formula and by torch's own account, for every family."""

import sys

import pytest
import torch
from reference import families
from reference.variants import slow
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from agcl.attribution import attribute
from agcl.loss import summed_loss
from agcl.lrp import attributed_linears
from agcl.model import adapter
from agcl.model.forward import autocast
from agcl.tasks import Encoded
from agcl.tasks.batches import collate
from pipeline.estimate.shape import shape_of

LENGTH, ROWS = 48, 4
TOKENS = LENGTH * ROWS
TOLERANCE = 0.06
module = sys.modules["agcl.attribution.batch"]
SIZES = {"hidden_size": 64, "intermediate_size": 160, "vocab_size": 80}
QUICK = ("LlamaForCausalLM", "GPT2LMHeadModel", "Gemma3ForCausalLM")
FAMILIES = [*QUICK, *slow(*(family for family in families.CONFIGS if family not in QUICK))]
OF_FAMILY = {
    "GPT2LMHeadModel": {"n_inner": 160},
    "MistralForCausalLM": {"head_dim": 16, "sliding_window": None},
    "Qwen3ForCausalLM": {"head_dim": 16},
    "Gemma2ForCausalLM": {"head_dim": 16},
    "Gemma3ForCausalLM": {"head_dim": 16, "sliding_window": 512},
}


class Ledger(TorchDispatchMode):
    """Knows every tensor that operations made, and which of them are still alive."""

    def __init__(self, model):
        super().__init__()
        self.weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.made = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.weights:
                    self.made[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def alive(self):
        return sum(size for storage, size in self.made.values() if not storage.expired())


def model_of(architecture, layers):
    changes = {**SIZES, **OF_FAMILY.get(architecture, {}), "num_hidden_layers": layers}
    model = families.model(architecture, dtype=torch.float32, **changes)
    for module in model.modules():  # As `load_model` does.
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    return model


def batch():
    drawn = torch.randint(3, 80, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    return collate([Encoded(ids, LENGTH - 8) for ids in drawn.tolist()])


def after_a_pass(model, precision):
    """Bytes that are alive after a forward pass in training."""
    with Ledger(model) as ledger:
        with autocast(torch.device("cpu"), precision):
            loss = summed_loss(model.train(), batch())
        held = ledger.alive()
    del loss
    return held


def per_layer(architecture, alive):
    """What a layer adds, from models of two and of three layers; and the shape."""
    two, three = (model_of(architecture, layers) for layers in (2, 3))
    shape = shape_of(two)
    return alive(three) - alive(two), shape


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "bfloat16 weights"])
@pytest.mark.parametrize("frozen", [False, True])
def test_what_a_layer_keeps_while_it_trains(architecture, precision, frozen):
    in_half = precision == "bfloat16 weights"

    def alive(model):
        if in_half:
            model.bfloat16()
        if frozen:
            names = attributed_linears(model)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in names or "layers.0" in name or "h.0" in name)
        return after_a_pass(model, "float32" if in_half else precision)

    found, shape = per_layer(architecture, alive)
    half = precision == "bfloat16"
    expected = shape.kept_by_training(TOKENS, LENGTH, half=half, frozen=frozen)
    if in_half:
        expected = shape.kept_in_bfloat16(TOKENS, LENGTH, frozen=frozen)
    expected += 2 * half * shape.linear_weights // shape.layers  # Their copies in bfloat16.
    assert found == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Gemma2ForCausalLM"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("in_half", [False, True])
def test_what_a_layer_keeps_while_its_adapter_trains(architecture, precision, in_half):
    def alive(model):
        if in_half:
            model.bfloat16()
        inner = adapter.attach(model, rank=4, alpha=8, seed=0).get_base_model()
        for name, parameter in inner.named_parameters():
            parameter.requires_grad_("lora_" in name)
        return after_a_pass(inner, precision)

    found, shape = per_layer(architecture, alive)
    half = precision == "bfloat16"
    expected = shape.kept_for_adapter(TOKENS, 4, autocast=half, in_half=in_half)
    if in_half:
        expected += shape.kept_in_bfloat16(TOKENS, LENGTH, frozen=True)
    else:
        expected += shape.kept_by_training(TOKENS, LENGTH, half=half, frozen=True)
        expected += 2 * half * shape.linear_weights // shape.layers
    assert found == pytest.approx(expected, rel=TOLERANCE + 0.02)


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "bfloat16 weights"])
def test_what_a_layer_keeps_while_it_is_attributed(architecture, precision, monkeypatch):
    """After the forward pass of the second batch; of the first one's nothing is left."""
    half, autocast = precision == "bfloat16 weights", precision == "bfloat16"
    answer_logits = module.answer_logits

    def alive(model):
        held = []
        if half:
            model.bfloat16()
        with Ledger(model) as ledger:

            def passed(*args):
                logits = answer_logits(*args)
                held.append(ledger.alive())
                return logits

            monkeypatch.setattr(module, "answer_logits", passed)
            options = {"entries": False, "moments": "relevance", "correct_only": False}
            options["precision"] = "bfloat16" if half or autocast else "float32"
            attribute(model, [batch(), batch()], **options)
        return torch.tensor(held)

    (first, second), shape = per_layer(architecture, alive)
    moments = 4 * sum(width**2 for width in shape.inputs)
    bits = {"half": half, "autocast": autocast}
    kept = moments + shape.held_by_hooks(TOKENS, entries=False, **bits)
    kept += shape.kept_by_attribution(TOKENS, LENGTH, **bits)
    kept += 2 * autocast * shape.linear_weights // shape.layers  # Their copies in bfloat16.
    assert first == pytest.approx(kept, rel=TOLERANCE)
    assert second == pytest.approx(first, rel=TOLERANCE / 10)
