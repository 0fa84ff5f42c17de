"""Adam's running means in one byte, against torchao's arithmetic and the float32 ones."""

import copy
import importlib.util
from itertools import pairwise

import pytest
import torch
from reference import tiny
from torch import nn

from agcl.modulation import GatedAdamW, eight_bit, rounding
from agcl.train import train_task

SHAPE = (64, 96)
LR = 1e-2


def gradients(steps, shape=SHAPE, dtype=torch.float32):
    """Of very different sizes, as those of a model."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        scale = torch.randn(shape, generator=generator).mul_(3).exp_()
        yield (torch.randn(shape, generator=generator) * scale).to(dtype)


def stepped(steps=6, dtype=torch.float32, resume_at=None, **options):
    """A weight after some steps on the same gradients."""
    generator = torch.Generator().manual_seed(1)
    weight = nn.Parameter(torch.randn(SHAPE, generator=generator).to(dtype))

    def made():
        return GatedAdamW([("w", weight)], lr=LR, eight_bit=True, **options)

    optimizer = made()
    for number, gradient in enumerate(gradients(steps, dtype=dtype)):
        if number == resume_at:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = made()
            optimizer.load_state_dict(saved)
        weight.grad = gradient
        optimizer.step()
    return weight.detach(), optimizer


def test_levels_are_those_of_the_paper():
    for signed in (True, False):
        levels = eight_bit.levels(signed)
        assert len(levels.unique()) == 256
        assert all(low < high for low, high in pairwise(levels.tolist()))
        assert levels[-1] == 1
        # In the top power of ten: 64 numbers from 0.1 to 1 with a sign, 128 without.
        assert int(((levels > 0.1) & (levels < 1)).sum()) == (64 if signed else 128)
    positive = eight_bit.levels(True)[eight_bit.levels(True) > 0]
    torch.testing.assert_close(-positive[:-1].flip(0), eight_bit.levels(True)[:127])


@pytest.mark.parametrize("signed", [True, False])
def test_what_is_read_is_the_nearest_level_of_every_block(signed):
    values = torch.cat(list(gradients(2))).double()
    values = (values if signed else values.square()).float()
    codes, magnitudes = eight_bit.zeros(values)
    assert not eight_bit.read(codes, magnitudes, signed=signed).any()
    eight_bit.write(values, codes, magnitudes, signed=signed)
    found = eight_bit.read(codes, magnitudes, signed=signed)
    blocks = values.view(-1, 256)
    offered = eight_bit.levels(signed)
    offered = offered if signed else offered[1:]  # A running square is never rounded to 0.
    offered = offered * blocks.abs().amax(1, keepdim=True)
    nearest = (blocks.unsqueeze(-1) - offered.unsqueeze(1)).abs().amin(-1)
    torch.testing.assert_close((found.view(-1, 256) - blocks).abs(), nearest, rtol=1e-4, atol=1e-7)


def test_weights_with_small_gradients_take_no_giant_steps():
    """Gradients of a matrix's rows that spread over five decades, and some that vanish."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.zeros(64, 96))
    optimizer = GatedAdamW([("w", weight)], lr=1.0, weight_decay=0.0, eight_bit=True)
    sizes = torch.logspace(-5, 0, 64).unsqueeze(1)
    longest = 0.0
    for step in range(30):
        before = weight.detach().clone()
        weight.grad = sizes * torch.randn(64, 96, generator=generator) * (step % 7 > 0)
        optimizer.step()
        longest = max(longest, float((weight - before).detach().abs().max()))
    assert longest < 4
    zero, codes = torch.zeros(4096), eight_bit.zeros(torch.zeros(4096))
    eight_bit.write(zero, *codes, signed=False)
    assert torch.equal(eight_bit.read(*codes, signed=False), zero)


def test_states_of_another_kind_are_refused():
    (_, eight), weight = stepped(), nn.Parameter(torch.zeros(SHAPE))
    plain = GatedAdamW([("w", weight)])
    weight.grad = torch.ones(SHAPE)
    plain.step()
    for optimizer, other in ((plain, eight), (eight, plain)):
        with pytest.raises(ValueError, match="another setting of eight_bit"):
            optimizer.load_state_dict(other.state_dict())


def test_what_is_not_stepped_in_float32_or_laid_out_otherwise_keeps_its_states():
    for weight in (
        nn.Parameter(torch.zeros(SHAPE, dtype=torch.float64)),
        nn.Parameter(torch.zeros(SHAPE, dtype=torch.bfloat16)),
        nn.Parameter(torch.zeros(96, 64).T),
    ):
        optimizer = GatedAdamW([("w", weight)], eight_bit=True)
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        assert optimizer.state[weight]["exp_avg"].dtype == weight.dtype


def test_a_step_is_torchaos():
    """Its functions, in its order; run where torchao is installed, without importing all of it."""
    spec = importlib.util.find_spec("torchao")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("torchao is not installed")
    file = f"{spec.submodule_search_locations[0]}/optim/quant_utils.py"
    module = importlib.util.spec_from_file_location("quant_utils", file)
    theirs = importlib.util.module_from_spec(module)
    module.loader.exec_module(theirs)
    weight, optimizer = stepped()
    generator = torch.Generator().manual_seed(1)
    expected = torch.randn(SHAPE, generator=generator)
    maps = {
        key: torch.tensor(theirs.create_dynamic_map(signed=key == "exp_avg"))
        for key in ("exp_avg", "exp_avg_sq")
    }
    means = {key: torch.zeros(SHAPE) for key in maps}
    for step, gradient in enumerate(gradients(6), 1):
        expected = expected - LR * 0.01 * expected
        first = means["exp_avg"].lerp(gradient, 0.1)
        second = means["exp_avg_sq"].lerp(gradient.square(), 0.001)
        width = second.sqrt() / (1 - 0.999**step) ** 0.5 + 1e-8
        expected = expected - LR * (first / (1 - 0.9**step)) / width
        for key, mean in (("exp_avg", first), ("exp_avg_sq", second)):
            scaled, scale = theirs.scale_tensor(mean, 256)
            codes = theirs.quantize_8bit_with_qmap(scaled, maps[key])
            if key == "exp_avg_sq":  # Ours is never 0.
                codes = torch.where(scaled > 0, codes.clamp(min=1), codes)
            means[key] = theirs.dequant_with_qmap(codes, maps[key], scale)
    torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-4)
    state = optimizer.state[next(iter(optimizer.state))]
    found = eight_bit.read(state["exp_avg"], state["exp_avg_magnitudes"], signed=True)
    assert ((found - means["exp_avg"]).abs() > 1e-6 * means["exp_avg"].abs()).float().mean() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_takes_a_byte_and_is_resumed_bit_for_bit(dtype):
    options = {"rounding": "stochastic", "seed": 3} if dtype == torch.bfloat16 else {}
    whole, optimizer = stepped(dtype=dtype, **options)
    (state,) = optimizer.state.values()
    sizes = [t.numel() * t.element_size() for key, t in state.items() if key != "step"]
    assert sum(sizes) == 2 * whole.numel() * (1 + 4 / 256)
    resumed, _ = stepped(dtype=dtype, resume_at=3, **options)
    assert torch.equal(resumed, whole)


def test_pieces_are_quantized_as_the_whole_tensor_is(monkeypatch):
    gate = {"w": torch.ones(SHAPE)}
    whole, _ = stepped(gate=gate)
    monkeypatch.setattr(rounding, "BLOCK_ENTRIES", 16 * SHAPE[1])
    weight = nn.Parameter(torch.zeros(SHAPE))
    assert eight_bit.fits(weight)  # Pieces of 16 rows hold six blocks each.
    pieces, _ = stepped(gate=gate)
    assert torch.equal(pieces, whole)
    monkeypatch.setattr(rounding, "BLOCK_ENTRIES", 15 * SHAPE[1])
    assert not eight_bit.fits(weight)  # Its means stay in float32.


def test_protection_holds_bit_for_bit():
    generator = torch.Generator().manual_seed(2)
    gate = torch.ones(SHAPE)
    gate[:7] = 0
    basis = torch.linalg.qr(torch.randn(SHAPE[1], 5, generator=generator))[0]
    start, _ = stepped(steps=0)
    gated, _ = stepped(gate={"w": gate})
    assert torch.equal(gated[:7], start[:7])
    free, _ = stepped()
    assert torch.equal(gated[7:], free[7:])
    kept, _ = stepped(basis={"w": basis})
    assert ((kept - start) @ basis).norm() < 1e-5 * ((free - start) @ basis).norm()


@pytest.mark.slow
def test_a_model_learns_as_with_float32_means():
    def loss(**options):
        model, logged = tiny.llama(width=64, spread=0.2), []
        optimizer = GatedAdamW(model.named_parameters(), lr=1e-3, **options)
        train_task(
            model,
            tiny.random_rows(8),
            optimizer,
            epochs=30,
            batch_size=8,
            seed=0,
            log=lambda metrics, step: logged.append(metrics["loss"]),
        )
        codes = sum(state["exp_avg"].dtype == torch.uint8 for state in optimizer.state.values())
        assert (codes >= 10) is bool(options)
        return logged[0], logged[-1]

    (first, exact), (_, found) = loss(), loss(eight_bit=True)
    assert exact < 0.3 * first
    assert found == pytest.approx(exact, rel=0.1)
