"""OSFT through PEFT: what is kept, what is trained, and what is merged."""

import math
from contextlib import suppress
from functools import partial

import pytest
import torch
from reference import families, tiny
from reference import workers as remote

from agcl.errors import InputError
from agcl.files import checkpoint as checkpoints
from agcl.files.checkpoint import Checkpoint
from agcl.lrp import attributed_linears
from agcl.model import subspace
from agcl.modulation import GatedAdamW
from agcl.tasks.batches import collate
from agcl.train import summed_loss, train_task

IDS = torch.arange(2, 10).unsqueeze(0)
SHARE = 0.4


@torch.no_grad()
def logits(model):
    return model(IDS, use_cache=False).logits


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


ADAM = partial(GatedAdamW, lr=1e-2)


def fitted(peft_model, make=ADAM, **options):
    model = peft_model.get_base_model()
    options = {"epochs": 5, "batch_size": 4, "micro_batch_size": 4, "seed": 0, **options}
    train_task(model, tiny.random_rows(8), make(trained(model).items()), **options)
    model.eval()
    return peft_model


def split(weight, share=SHARE):
    """U, S, V of a weight by an SVD in float64, and how many of its directions are kept."""
    u, s, v = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    return u, s, v, max(1, math.floor(len(s) * share))


@pytest.mark.parametrize("architecture", [a for a in families.CONFIGS if a != "GPT2LMHeadModel"])
def test_decomposing_changes_nothing_and_leaves_only_the_low_factors_to_train(architecture):
    model = families.model(architecture)
    before, weights = logits(model), dict(model.named_parameters())
    linears = {name: weights[name].shape for name in attributed_linears(model)}
    inner = subspace.attach(model, preserved=SHARE).get_base_model()
    # PEFT decomposes in float32.
    torch.testing.assert_close(logits(inner), before, rtol=1e-4, atol=1e-4)
    names = trained(inner)
    assert names.keys() == subspace.factors(inner)
    assert {name.partition(".osf_")[0] + ".weight" for name in names} == linears.keys()
    for name, (out, width) in linears.items():
        layer = name.removesuffix("weight") + "osf_svd_params.default."
        low = min(out, width) - max(1, math.floor(min(out, width) * SHARE))
        assert names[f"{layer}U_low"].shape == (out, low)
        assert names[f"{layer}S_low"].shape == (low,)
        assert names[f"{layer}V_low"].shape == (low, width)


def test_a_larger_share_keeps_more_directions_and_a_tiny_one_still_keeps_one():
    low = [
        {name: p.shape[1] for name, p in trained(model).items() if name.endswith("U_low")}
        for model in (
            subspace.attach(tiny.llama(), preserved=share).get_base_model()
            for share in (0.01, 0.3, 0.6, 0.99)
        )
    ]
    for name, rank in low[0].items():
        smaller = [each[name] for each in low]
        assert smaller == sorted(smaller, reverse=True), name
        assert rank == {"k": 7, "v": 7}.get(name.rpartition("_proj")[0][-1], 15)
        assert smaller[-1] == 1


def test_gradients_are_those_of_the_factors_projected_off_what_is_kept():
    model, batch = tiny.llama(), collate(tiny.random_rows(6))
    summed_loss(model, batch).backward()
    plain = {name: (p.detach().clone(), p.grad) for name, p in model.named_parameters()}
    inner = subspace.attach(tiny.llama(), preserved=SHARE).get_base_model()
    summed_loss(inner, batch).backward()
    factors = trained(inner)
    for name in attributed_linears(model):
        weight, gradient = plain[name]
        u, s, v, kept = split(weight)
        of_weight, layer = gradient.double(), name.removesuffix("weight") + "osf_svd_params."
        of_u = of_weight @ v[kept:].T * s[kept:]
        of_v = s[kept:, None] * (u[:, kept:].T @ of_weight)
        expected = {
            "U_low": of_u - u[:, :kept] @ (u[:, :kept].T @ of_u),
            "S_low": ((u[:, kept:].T @ of_weight) * v[kept:]).sum(1),
            "V_low": of_v - of_v @ v[:kept].T @ v[:kept],
        }
        # Directions are unique up to their sign.
        sign = (factors[f"{layer}default.U_low"].double() * u[:, kept:]).sum(0).sign()
        expected["U_low"], expected["V_low"] = (
            expected["U_low"] * sign,
            expected["V_low"] * sign[:, None],
        )
        for factor, value in expected.items():
            found = factors[f"{layer}default.{factor}"].grad
            assert value.abs().max() > 1e-3
            torch.testing.assert_close(found, value.float(), rtol=1e-3, atol=1e-4)


def test_the_merged_weight_is_the_old_one_with_its_low_part_replaced():
    peft_model = fitted(subspace.attach(tiny.llama(), preserved=SHARE))
    inner = peft_model.get_base_model()
    answers, factors = logits(inner), {n: p.detach().double() for n, p in trained(inner).items()}
    model = subspace.merged(peft_model)
    torch.testing.assert_close(logits(model), answers, rtol=1e-4, atol=1e-4)
    assert (logits(model) - logits(tiny.llama())).abs().max() > 0.1
    before = dict(tiny.llama().named_parameters())
    assert [(n, p.shape) for n, p in model.named_parameters()] == [
        (n, p.shape) for n, p in before.items()
    ]
    assert all(p.requires_grad for p in model.parameters())
    for name, weight in model.named_parameters():
        expected = before[name].detach().double()
        if name in attributed_linears(model):
            u, s, v, kept = split(expected)
            layer = name.removesuffix("weight") + "osf_svd_params.default."
            low = [factors[layer + part] for part in ("U_low", "S_low", "V_low")]
            expected = (u[:, :kept] * s[:kept]) @ v[:kept] + (low[0] * low[1]) @ low[2]
        torch.testing.assert_close(weight.double(), expected, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(("optimizer", "leaves"), [("sgd", False), ("adam", True)])
def test_gradient_steps_keep_off_the_leading_directions_and_adams_do_not_quite(optimizer, leaves):
    """PEFT projects gradients, not steps: a property of the rival, which `agcl` does not share."""
    make = {
        "sgd": lambda named: torch.optim.SGD([p for _, p in named], lr=0.1),
        "adam": lambda named: GatedAdamW(named, lr=1e-2, weight_decay=0.0),
    }[optimizer]
    model = subspace.merged(fitted(subspace.attach(tiny.llama(), preserved=SHARE), make))
    weights, before = dict(model.named_parameters()), dict(tiny.llama().named_parameters())
    for name in attributed_linears(model):
        u, _, v, kept = split(before[name])
        change = (weights[name] - before[name]).detach().double()
        assert change.norm() > 1e-3
        for moved in (u[:, :kept].T @ change, change @ v[:kept].T):
            leak = float(moved.norm() / change.norm())
            assert (1e-2 < leak < 0.9) if leaves else (leak < 1e-4), name


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_in_float32_learn_on_a_base_of_either_dtype(dtype, precision):
    losses = []
    peft_model = subspace.attach(tiny.llama(dtype=dtype), preserved=SHARE)
    inner = peft_model.get_base_model()
    assert {p.dtype for p in trained(inner).values()} == {torch.float32}
    log = lambda metrics, step: losses.append(metrics["loss"])  # noqa: E731
    fitted(peft_model, epochs=20, precision=precision, log=log)
    assert losses[-1] < 0.5 * losses[0]
    assert {p.dtype for p in subspace.merged(peft_model).parameters()} == {dtype}


def test_an_interrupted_task_resumes_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "_MAX_TIME_SHARE", math.inf)

    class Interrupted(Exception):
        pass

    def run(stop=None):
        steps = []

        def penalise():
            if len(steps) == stop:
                raise Interrupted
            return torch.zeros(())

        peft_model = subspace.attach(tiny.llama(), preserved=SHARE)
        kept = None if name is None else Checkpoint(tmp_path / name, "a task", 0.0)
        log = lambda metrics, step: steps.append(metrics["loss"])  # noqa: E731
        with suppress(Interrupted):
            fitted(peft_model, checkpoint=kept, penalise=penalise, log=log)
        return steps, dict(subspace.merged(peft_model).named_parameters())

    name = None
    losses, whole = run()
    name = "file"
    assert len(run(stop=4)[0]) == 4
    again, resumed = run()
    assert again == losses
    assert all(torch.equal(resumed[key], value) for key, value in whole.items())


def test_two_ranks_train_one_decomposition_even_if_theirs_have_other_signs(workers):
    rows = tiny.random_rows(10)
    options = {"epochs": 2, "batch_size": 6, "micro_batch_size": 2, "seed": 3}
    losses, weights = remote.train_in_subspace(rows, SHARE, **options)
    first, second = workers.run(remote.train_in_subspace, rows, SHARE, **options)
    assert first[0] == second[0] == pytest.approx(losses, rel=1e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(first[1][name], weight, rtol=1e-3, atol=1e-3, msg=name)
        assert torch.equal(first[1][name], second[1][name]), name


def test_weights_that_peft_cannot_decompose_are_refused():
    with pytest.raises(InputError, match="GPT2LMHeadModel stores its weights as"):
        subspace.attach(families.model("GPT2LMHeadModel"), preserved=SHARE)
    for share in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match="preserved must be between 0 and 1"):
            subspace.attach(tiny.llama(), preserved=share)
