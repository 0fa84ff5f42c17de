"""Fixtures for all tests: tiny models built in code, and two worker processes."""

import os
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import settings
from reference import tiny
from reference.workers import Workers
from transformers import LlamaForCausalLM

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Read where a kernel is defined.
os.environ.setdefault("RAY_worker_niceness", "0")  # Else the tests beside it slow it down.
# `pytest --hypothesis-profile=thorough tests/*/test_fuzz*` is for changes of what reads input.
settings.register_profile("quick", max_examples=60, deadline=None, derandomize=True)
settings.register_profile("thorough", max_examples=3000, deadline=None, print_blob=True)
settings.load_profile("quick")


@pytest.fixture
def exact_llama() -> LlamaForCausalLM:
    """A float64 Llama with grouped-query attention, exact to float64 throughout."""
    return tiny.with_exact_norms(tiny.llama(dtype=torch.float64))


@pytest.fixture
def llama() -> LlamaForCausalLM:
    """A float32 Llama with grouped-query attention."""
    return tiny.llama()


@pytest.fixture(scope="session")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """Two gloo processes; functions to run are in `reference.workers`."""
    pool = Workers(tmp_path_factory.mktemp("workers"))
    yield pool
    pool.close()


@pytest.fixture
def gradients() -> Callable[[LlamaForCausalLM], dict[str, torch.Tensor]]:
    """Ordinary gradients of all weights for a fixed input, whatever their flags."""

    def of(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
        weights = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
        ids = torch.arange(2, 9).unsqueeze(0)
        output = torch.func.functional_call(model, weights, (ids,), {"use_cache": False})
        names, leaves = zip(*weights.items(), strict=True)
        found = torch.autograd.grad(output.logits.pow(2).sum(), leaves)
        return dict(zip(names, found, strict=True))

    return of


@pytest.hookimpl(tryfirst=True)  # Before xdist reads the marks.
def pytest_collection_modifyitems(items):
    """With several processes, what looks at the finished runs goes to one, the rest by file.

    But for the search's: its tests take as long as all others on them, and make runs of their own.
    What uses the two worker processes, or a made database, goes to one too, since making those
    takes seconds.
    What starts Ray takes longest and goes first, so that no process is left with it at the end.
    """
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)
    for item in items:
        shares = "finished" in item.fixturenames and item.path.name != "test_search.py"
        name = "finished" if shares else str(item.path)
        for made in ("workers", "raced"):
            name = made if made in item.fixturenames else name
        item.add_marker(pytest.mark.xdist_group(name))
        if "finished" in item.fixturenames:
            # The first of these tests waits until the runs are made: ten minutes on a slow machine.
            item.add_marker(pytest.mark.timeout(1800))
