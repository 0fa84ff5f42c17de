"""Two gloo processes, started once per test session, and the functions that tests run in them."""

import faulthandler
import os
import pickle
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from reference.moments import matrices

PATIENCE = 120
"""Timeout for a result, in seconds."""


class Workers:
    """`run` calls the same function in both processes and returns both results."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.started = folder, 0
        self.ends: list[Any] = []
        self.processes: list[Any] = []

    def run(self, function: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
        """Results in rank order. The first exception in a process is raised here.

        If it left another process without a result, the next call starts new processes.
        """
        if not self.processes:
            self._start()
        for end in self.ends:
            # Plain pickles: multiprocessing's own would share tensor memory between processes.
            end.send_bytes(pickle.dumps((function, args, options)))
        results: dict[Any, Any] = {}
        failure: Exception | None = None
        while waiting := [end for end in self.ends if end not in results]:
            # A failed process may have left the other waiting for it.
            if not (ready := wait(waiting, 10 if failure else PATIENCE)):
                stuck = f"no answer in {PATIENCE} s; where the workers are:\n{self._stacks()}"
                self.close()
                raise failure or TimeoutError(stuck)
            for end in ready:
                results[end] = pickle.loads(end.recv_bytes())
                if isinstance(results[end], Exception):
                    failure = failure or results[end]
        if failure:
            raise failure
        return [results[end] for end in self.ends]

    def _start(self) -> None:
        context = get_context("spawn")
        self.started += 1
        meeting = self.folder / f"rendezvous-{self.started}"
        for rank in range(2):
            ours, theirs = context.Pipe()
            args = (rank, meeting, self._stack_file(rank), theirs)
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            self.ends.append(ours)
            self.processes.append(process)

    def _stack_file(self, rank: int) -> Path:
        return self.folder / f"stacks-{self.started}-{rank}"

    def _stacks(self) -> str:
        for process in self.processes:
            os.kill(process.pid, signal.SIGUSR1)
        time.sleep(1)
        return "\n".join(self._stack_file(rank).read_text() for rank in range(2))

    def close(self) -> None:
        """Stop the processes."""
        for end in self.ends:
            end.close()
        for process in self.processes:
            process.join(10)
            process.kill()
        self.ends, self.processes = [], []


def _serve(rank: int, meeting: Path, stacks: Path, end: Any) -> None:
    faulthandler.register(signal.SIGUSR1, stacks.open("w"))
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    while True:
        try:
            function, args, options = pickle.loads(end.recv_bytes())
        except EOFError:
            return
        try:
            result = function(*args, **options)
        except Exception as error:
            result = error
        end.send_bytes(pickle.dumps(result))


def attribute_batches(rows: Any, batch_size: int, model: dict[str, Any], **options: Any) -> Any:
    """Attribute this rank's share of the batches (round-robin) or of the layers."""
    from reference import tiny

    from agcl.attribution import attribute
    from agcl.parallel import distributed
    from agcl.tasks.batches import collate, in_order

    batches = in_order(len(rows), batch_size)
    if options.get("split") != "layers":
        batches = batches[distributed.rank() :: distributed.world_size()]
    importance = attribute(
        tiny.llama(**model), (collate([rows[i] for i in b]) for b in batches), **options
    )
    return dict(importance.entries), matrices(importance.moments), dict(importance.header)


def train_rows(
    rows: Any,
    model: dict[str, Any],
    rounding: Literal["nearest", "stochastic"] = "nearest",
    **options: Any,
) -> Any:
    """The loss of every step and the trained weights."""
    from reference import tiny

    from agcl.modulation import GatedAdamW
    from agcl.train import train_task

    trained, losses = tiny.llama(**model), []
    train_task(
        trained,
        rows,
        GatedAdamW(trained.named_parameters(), lr=1e-2, rounding=rounding),
        log=lambda metrics, step: losses.append(metrics["loss"]),
        **options,
    )
    return losses, {name: p.detach() for name, p in trained.named_parameters()}


def train_in_subspace(rows: Any, preserved: float, **options: Any) -> Any:
    """`train_rows` beside the leading singular directions, which the second rank finds negated."""
    from peft.tuners.osf import layer
    from reference import tiny

    from agcl.model import subspace
    from agcl.modulation import GatedAdamW
    from agcl.parallel import distributed
    from agcl.train import train_task

    decompose = layer.decompose_weight_matrix

    def negated(weight: torch.Tensor, top_k: int) -> Any:
        found = decompose(weight, top_k)
        for name in ("U_high", "V_high", "U_low", "V_low"):
            found[name].data.neg_()
        return found

    layer.decompose_weight_matrix = negated if distributed.rank() else decompose
    peft_model, losses = subspace.attach(tiny.llama(), preserved=preserved), []
    layer.decompose_weight_matrix = decompose
    inner = peft_model.get_base_model()
    train_task(
        inner,
        rows,
        GatedAdamW([(n, p) for n, p in inner.named_parameters() if p.requires_grad], lr=1e-2),
        log=lambda metrics, step: losses.append(metrics["loss"]),
        **options,
    )
    merged = subspace.merged(peft_model)
    return losses, {name: p.detach() for name, p in merged.named_parameters()}


def train_with_checkpoint(
    rows: Any, folders: list[Path], stop: int | None = None, **options: Any
) -> Any:
    """`train_rows`, optionally up to a step, with a checkpoint per step in the rank's folder."""
    from reference import tiny

    from agcl.files import checkpoint as checkpoints
    from agcl.modulation import GatedAdamW
    from agcl.parallel import distributed
    from agcl.train import train_task

    class Interrupted(Exception):
        pass

    def penalise() -> torch.Tensor:
        if len(losses) == stop:
            raise Interrupted
        return torch.zeros(())

    checkpoints._MAX_TIME_SHARE = float("inf")
    trained, losses = tiny.llama(), []
    with suppress(Interrupted):
        train_task(
            trained,
            rows,
            GatedAdamW(trained.named_parameters(), lr=1e-2),
            penalise=penalise,
            checkpoint=checkpoints.Checkpoint(folders[distributed.rank()] / "file", "a task", 0.0),
            log=lambda metrics, step: losses.append(metrics["loss"]),
            **options,
        )
    return losses, {name: p.detach() for name, p in trained.named_parameters()}


def verdicts(rows: Any, model: dict[str, Any], **options: Any) -> list[bool]:
    from reference import tiny

    return tiny.exact_match(tiny.llama(**model), rows, **options)


def loss_and_kl(count: int, model: dict[str, Any], base: dict[str, Any]) -> tuple[float, float]:
    """On a text of so many tokens."""
    from reference import tiny

    from agcl.scoring.evaluate import text_loss_and_kl

    return text_loss_and_kl(
        tiny.llama(**model), tiny.llama(**base), [2 + i % 38 for i in range(count)]
    )


def exchanged() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Tensors of two dtypes and shapes summed over ranks, and one gathered from them."""
    from agcl.parallel import distributed

    mine = distributed.rank() + 1
    tensors = [
        torch.full((2, 3), float(mine)),
        torch.tensor(10 * mine),
        torch.tensor([0.5 * mine], dtype=torch.float64),
        torch.full((3, 2), float(mine)).T,
    ]
    distributed.sum_in_place(tensors)
    return tensors, distributed.gather(torch.tensor([mine, -mine]))


def generated(prompts: Any, model: dict[str, Any], **options: Any) -> list[list[int]]:
    from reference import tiny

    from agcl.scoring.generate import generate

    return generate(tiny.llama(**model), prompts, **options)


def wait_for_a_slow_rank(wait: str, seconds: float, timeout: float) -> float:
    """Rank 0 comes `seconds` late to a meeting or a collective of a group with this timeout."""
    from datetime import timedelta

    from reference import tiny

    from agcl.parallel import distributed, sharding

    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout))
    weight = sharding.shard(tiny.llama(), torch.device("cpu")).lm_head.weight
    rank, tensor = distributed.rank(), torch.ones(2)
    waits: dict[str, Callable[[], Any]] = {
        "meet": distributed.meet,
        "sum": lambda: distributed.sum_in_place([tensor]),
        "gather": lambda: distributed.gather(tensor),
        "broadcast": lambda: distributed.broadcast(tensor, 0),
        "object": lambda: distributed.broadcast_object("word"),
        "sharded": lambda: sharding.whole(weight),
    }
    distributed.meet()
    started = time.monotonic()
    if rank == 0:
        time.sleep(seconds)
    waits[wait]()
    return time.monotonic() - started


def sums_in_buckets(bucket_bytes: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Sums over ranks of tensors of many shapes, in buckets and in one flat message per dtype."""
    from unittest.mock import patch

    from agcl.parallel import distributed

    generator = torch.Generator().manual_seed(distributed.rank())
    shapes = [(), (3, 4), (20,), (0, 5), (2, 3, 2), (7,), (1, 30)]
    tensors = [torch.randn(s, generator=generator) for s in shapes]
    tensors.append(torch.randn(4, 6, generator=generator).T)
    tensors.append(torch.randn(5, generator=generator).double())
    tensors.insert(3, torch.randn(6, generator=generator).bfloat16())
    found = [tensor.clone() for tensor in tensors]
    with patch.object(distributed, "BUCKET_BYTES", bucket_bytes):
        distributed.sum_in_place(found)
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):  # In one order on all ranks.
        same = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.reshape(-1) for tensor in same])
        dist.all_reduce(flat)
        for tensor, part in zip(same, flat.split([t.numel() for t in same]), strict=True):
            tensor.copy_(part.view_as(tensor))
    return found, tensors


def gradients_of_experts(bucket_bytes: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Sums over ranks of the gradients of two passes, and of both ranks' gradients gathered.

    Of four layers rank 0's last pass uses the first two, rank 1's the first and the third.
    """
    from unittest.mock import patch

    from agcl.parallel import distributed, gradients

    rank = distributed.rank()
    torch.manual_seed(0)
    layers = [torch.nn.Linear(8, 8) for _ in range(4)]
    parameters = [p for layer in layers for p in layer.parameters()]
    inputs = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(rank))

    def last_pass() -> None:
        layers[1 + rank](layers[0](inputs[1])).square().sum().backward()

    layers[0](inputs[0]).square().sum().backward()
    last_pass()
    own = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    layers[0](inputs[0]).square().sum().backward()
    with patch.object(distributed, "BUCKET_BYTES", bucket_bytes), gradients.summed(parameters):
        last_pass()
    found = [p.grad for p in parameters if p.grad is not None]
    assert len(found) == len(parameters)
    return found, [torch.stack(distributed.gather(each)).sum(0) for each in own]


def trained_by_a_trainer(way: str, folder: Path) -> Any:
    """What a Trainer makes of a tiny model under a basis, data-parallel on both ranks."""
    from reference import tiny
    from reference.trainers import basis_of, trainer, weights

    from agcl.integrations.transformers import Protect
    from agcl.parallel import distributed

    rank, size = str(distributed.rank()), str(distributed.world_size())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
    model = tiny.llama()
    protection = {"basis": basis_of(model)}
    options: dict[str, Any] = {"protected": protection}
    if way == "callback":
        options = {"callbacks": [Protect(**protection)]}
    made = trainer(model, folder, gradient_accumulation_steps=1, ddp_backend="gloo", **options)
    made.train()
    return type(made.model_wrapped).__name__, weights(model)


def bases_of_rank_zero() -> dict[str, Any]:
    """Bases that each rank computed otherwise, one for two weights and one in columns; rank 0's."""
    from agcl.parallel import distributed

    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(rank)
    shared = torch.randn(6, 2 + rank, generator=generator)
    columns = torch.randn(4, 6, generator=generator).T
    placed: list[torch.device] = []
    send = dist.broadcast

    def seen(tensor: torch.Tensor, source: int) -> None:
        placed.append(tensor.device)
        assert tensor.is_contiguous()
        send(tensor, source)

    dist.broadcast = seen
    try:
        found = distributed.of_rank_zero(
            {"q": shared, "k": shared, "o": columns}, torch.device("cpu")
        )
    finally:
        dist.broadcast = send
    strides = {name: tensor.stride() for name, tensor in found.items()}
    return {
        "found": {name: tensor.clone() for name, tensor in found.items()},
        "shared": found["q"] is found["k"],
        "strides": strides,
        "sent": len(placed),
    }
