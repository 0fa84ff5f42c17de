"""The GPU's kernel, in Triton's interpreter: the same running values as a slow oracle's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="comes with torch's CUDA builds")


@pytest.fixture
def insert():
    """The kernel, interpreted on the CPU (see `conftest.py`) where there is no GPU."""
    from agcl.attribution.kernels.gpu import insert_products

    on_gpu = torch.cuda.is_available()

    def insert(values, *tensors):
        moved = [t.cuda() if on_gpu else t for t in (values, *tensors)]
        insert_products(*moved)
        values.copy_(moved[0])

    return insert


def drawn(samples, tokens, width, rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, width), (samples, tokens, width), (samples, tokens, rows)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def expected(weight, x, g, k):
    slow = [weight.double() * (g[b].double().T @ x[b].double()) for b in range(len(x))]
    padding = [torch.full_like(slow[0], -torch.inf)] * k
    return torch.stack([*slow, *padding]).topk(k, dim=0).values


@pytest.mark.parametrize("k", [1, 4, 8])
@pytest.mark.parametrize(
    ("samples", "tokens", "width", "rows"), [(6, 5, 17, 11), (3, 40, 130, 33), (9, 16, 64, 16)]
)
def test_running_values_equal_those_of_every_sample_alone(insert, samples, tokens, width, rows, k):
    weight, x, g = drawn(samples, tokens, width, rows)
    values = torch.full((k, rows, width), -torch.inf)
    insert(values, weight, x[:2], g[:2])
    insert(values, weight, x[2:], g[2:])
    torch.testing.assert_close(values.double(), expected(weight, x, g, k), rtol=1e-5, atol=1e-5)


def test_bfloat16_running_values_are_the_rounded_ones(insert):
    weight, x, g = drawn(6, 5, 17, 11)
    wide, halved = (torch.full((4, 11, 17), -torch.inf, dtype=d) for d in (None, torch.bfloat16))
    for part in (slice(0, 2), slice(2, 6)):
        insert(wide, weight, x[part], g[part])
        insert(halved, weight, x[part], g[part])
    # A GPU rounds to the nearest; the interpreter cuts off.
    torch.testing.assert_close(halved.float(), wide, rtol=2**-7, atol=0)


def test_strides_of_views_are_heeded(insert):
    weight, x, g = drawn(4, 6, 20, 12)
    values = torch.full((2, 12, 20), -torch.inf)
    turned = [t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in (weight, x, g)]
    insert(values, *turned)
    torch.testing.assert_close(values.double(), expected(weight, x, g, 2), rtol=1e-5, atol=1e-5)


def test_a_value_that_is_no_number_stays_in_sight(insert):
    values = torch.full((2, 3, 4), torch.nan)
    insert(values, *drawn(3, 2, 4, 3))
    assert values.isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("k", [1, 4, 8])
def test_on_a_gpu_it_gives_what_the_cpu_gives(k):
    from agcl.attribution.top_k import TopK

    weight, x, g = drawn(9, 24, 200, 70)
    found, wanted = TopK(k, weight.cuda()), TopK(k, weight)
    found.insert_products(weight.cuda(), x.cuda(), g.cuda())
    wanted.insert_products(weight, x, g)
    torch.testing.assert_close(found.values.cpu(), wanted.values, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("k", "kept_in"), [(4, "fp32"), pytest.param(8, "bf16", marks=pytest.mark.slow)]
)
def test_it_compiles_for_a_gpu_without_one(tmp_path, k, kept_in):
    """In a process of its own: here Triton interprets."""
    done = subprocess.run(
        [sys.executable, "tests/reference/compile_kernel.py", "90", str(k), kept_in],
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
        | {"PYTHONPATH": "."},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 1000
