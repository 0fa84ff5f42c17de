"""Functions that tests run on ranks with a sharded model, and on one process with a whole one."""

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from reference import families, tiny
from reference.moments import matrices
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from agcl.attribution import attribute
from agcl.files import checkpoint as checkpoints
from agcl.importance import Importance
from agcl.lrp import attributed_linears, stored_transposed
from agcl.model import adapter, models
from agcl.model.forward import activation_checkpointing
from agcl.modulation import (
    GatedAdamW,
    quadratic_penalty,
    random_bases,
    rounding,
    weight_bases,
)
from agcl.parallel import distributed, sharding
from agcl.scoring import probes
from agcl.scoring.evaluate import answer_kl, text_loss_and_kl
from agcl.scoring.generate import generate
from agcl.tasks import Encoded
from agcl.tasks.batches import collate, in_order
from agcl.train import train_task

SETTINGS = {"epochs": 2, "batch_size": 5, "micro_batch_size": 2, "seed": 3}


def model_of(architecture: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """The model, sharded if there are several ranks."""
    built = families.model(architecture, dtype=dtype, **changes)
    return sharding.shard(built, torch.device("cpu")) if distributed.world_size() > 1 else built


def weights_of(model: Any) -> dict[str, Tensor]:
    return {name: sharding.whole(p.detach()).clone() for name, p in model.named_parameters()}


def directions_of_weights(architecture: str) -> dict[str, Tensor]:
    """The leading input directions of every linear layer's weight."""
    model = model_of(architecture)
    names, transposed = attributed_linears(model), stored_transposed(model)
    weights = {name: p for name, p in model.named_parameters() if name in names}
    return weight_bases(weights, energy=0.6, transposed=transposed)


def task(
    architecture: str,
    rows: Sequence[Encoded],
    *,
    gate: Mapping[str, Tensor] | None = None,
    basis: Mapping[str, Tensor] | None = None,
    fisher: Mapping[str, Tensor] | None = None,
    frozen: str = "",
    checkpointing: bool = False,
    packed: bool = False,
) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Metrics of every step and the weights after training with these protections and settings.

    In float64: where a gradient is zero up to rounding, Adam still takes a full-size step.
    """
    model, steps = model_of(architecture, torch.float64), []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name != frozen)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    transposed = stored_transposed(model) if basis else ()
    optimizer = GatedAdamW(trained.items(), lr=1e-2, gate=gate, basis=basis, transposed=transposed)
    with activation_checkpointing(model, checkpointing):
        train_task(
            model,
            rows,
            optimizer,
            penalise=quadratic_penalty(trained, [Importance(fisher)], strength=2.0)
            if fisher
            else None,
            packing=packed,
            log=lambda metrics, step: steps.append(metrics),
            **SETTINGS,
        )
    return steps, weights_of(model)


class Adapted(NamedTuple):
    losses: list[float]
    factors: dict[str, Tensor]
    entries: dict[str, Tensor]
    """Importance of the factors."""
    merged: dict[str, Tensor]
    sharded: set[str]
    """Parameters of which this rank holds some rows only."""


def adapted(
    architecture: str,
    rows: Sequence[Encoded],
    *,
    protected: bool = False,
    start: Path | None = None,
    save: Path | None = None,
    checkpointing: bool = False,
) -> Adapted:
    """Training of an adapter, its importance, and the model it is merged into.

    With `protected` the factors have a gate, A a basis too. In float64, see `task`.
    """
    peft_model = adapter.attach(
        model_of(architecture, torch.float64), rank=2, alpha=4.0, seed=1, start=start
    )
    model, losses = peft_model.get_base_model().double(), []
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    generator, protection = torch.Generator().manual_seed(2), {}
    if protected:
        ofs = {name: p.shape for name, p in trained.items()}
        protection = {
            "gate": {n: torch.rand(shape, generator=generator) for n, shape in ofs.items()},
            "basis": random_bases(
                {n: torch.empty(s[1], 3) for n, s in ofs.items() if ".lora_A" in n}, seed=3
            ),
        }
    with activation_checkpointing(model, checkpointing):
        train_task(
            model,
            rows,
            GatedAdamW(trained.items(), lr=1e-2, **protection),
            log=lambda metrics, step: losses.append(metrics["loss"]),
            **SETTINGS,
        )
    factors = {name: p.detach().clone() for name, p in trained.items()}
    sharded = {n for n, p in model.named_parameters() if isinstance(p, DTensor)}
    found = attribute(model, [collate(rows)], correct_only=False, split="layers")
    if save and distributed.rank() == 0:
        adapter.save(peft_model, save, "base")
    merged = weights_of(adapter.merged(peft_model))
    return Adapted(losses, factors, dict(found.entries), merged, sharded)


def rounded_steps(
    architecture: str, gate: Mapping[str, Tensor], basis: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """bfloat16 weights after steps on given gradients, protected, in small pieces."""
    model = model_of(architecture, torch.bfloat16)
    transposed = stored_transposed(model)
    optimizer = GatedAdamW(
        model.named_parameters(),
        gate=gate,
        basis=basis,
        transposed=transposed,
        lr=1e-3,
        rounding="stochastic",
    )
    with patch.object(rounding, "BLOCK_ENTRIES", 100):
        for step in range(3):
            for number, parameter in enumerate(model.parameters()):
                generator = torch.Generator().manual_seed(100 * number + step)
                slope = torch.randn(parameter.shape, generator=generator).bfloat16()
                parameter.grad = sharding.placed_like(slope, parameter)
            optimizer.step()
    return weights_of(model)


def scores(
    architecture: str, rows: Sequence[Encoded]
) -> tuple[list[bool], list[list[int]], list[float]]:
    """Exact-match verdicts, generated tokens, and loss and divergences from another model."""
    model, base = model_of(architecture), model_of(architecture, seed=1)
    prompts = [row.input_ids[: row.prompt_tokens] for row in rows]
    return (
        tiny.exact_match(model, rows, batch_size=2),
        generate(model, prompts, end=tiny.END, max_new_tokens=6, batch_size=2),
        [
            *text_loss_and_kl(model, base, [2 + i % 38 for i in range(300)]),
            answer_kl(model, base, rows),
        ],
    )


def probed(architecture: str, tokenizer: Any, questions: Any) -> Any:
    """Scores of multiple-choice questions, in batches of about six choices."""
    model = model_of(architecture, vocab_size=len(tokenizer))
    return probes.score(model, tokenizer, questions, batch_size=6)


def importance(architecture: str, rows: Sequence[Encoded], **options: Any) -> Any:
    """Entries, moments and header, and whether weights and flags are unchanged."""
    model = model_of(architecture)
    before = weights_of(model)
    batches = (collate([rows[i] for i in b]) for b in in_order(len(rows), 3))
    found = attribute(model, batches, correct_only=False, **options)
    same = all(torch.equal(w, before[name]) for name, w in weights_of(model).items())
    same &= all(parameter.requires_grad for parameter in model.parameters())
    return dict(found.entries), matrices(found.moments), dict(found.header), same


def stages(rows: Sequence[Encoded]) -> list[float]:
    """Losses of training, attribution, and training with half of the weights frozen."""
    model, losses = model_of("LlamaForCausalLM"), []
    for frozen in ("", "mlp"):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not (frozen and frozen in name))
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        train_task(
            model,
            rows,
            GatedAdamW(trained, lr=1e-2),
            log=lambda metrics, step: losses.append(metrics["loss"]),
            **SETTINGS,
        )
        attribute(model, [collate(rows)], top_k=2, correct_only=False, split="layers")
        tiny.exact_match(model, rows, batch_size=4)
    return losses


def as_often_as_asked() -> AbstractContextManager[Any]:
    """Lift the limit on the time spent writing checkpoints."""
    return patch.object(checkpoints, "_MAX_TIME_SHARE", float("inf"))


class Resumed(NamedTuple):
    losses: list[float]
    weights: dict[str, Tensor]
    steps: int
    """How many came from the checkpoint."""
    warnings: list[str]


def with_checkpoint(
    rows: Sequence[Encoded],
    folder: Path,
    stop: int | None = None,
    *,
    apart: bool = False,
    fails: Mapping[str, str] | None = None,
    remove: bool = False,
    whole: bool = False,
    bucket: str | None = None,
    **copies: Any,
) -> Resumed:
    """Training, optionally up to a step, with a checkpoint per step.

    With `apart` every rank has a folder of its own, as on two machines. `fails` has by the end of a
    file's name the error on writing it. `remove` removes the checkpoint in the end, as a session
    does. `whole` does not shard the model. A storage in a `bucket` has its cache in the folder. For
    other `copies` see `_copied`.
    """

    class Interrupted(Exception):
        pass

    def penalise() -> Tensor:
        if len(losses) == stop:
            raise Interrupted
        return torch.zeros(())

    def restore(*args: Any) -> Any:
        restored.append(type(checkpoint).restore(checkpoint, *args))
        return [*restored[0]]

    folder = folder / str(distributed.rank()) if apart else folder
    folder.mkdir(exist_ok=True)
    architecture = "LlamaForCausalLM"
    model = families.model(architecture) if whole else model_of(architecture)
    checkpoint = (
        _in_bucket(bucket, folder)
        if bucket
        else checkpoints.Checkpoint(folder / "file", "a task", 0.0, **_copied(**copies))
    )
    losses, warnings, restored = [], [], []
    with (
        patch.object(checkpoint, "restore", restore),
        patch.object(checkpoint, "warn", warnings.append),
        suppress(Interrupted),
        as_often_as_asked(),
        _failing(fails or {}),
    ):
        train_task(
            model,
            rows,
            GatedAdamW(model.named_parameters(), lr=1e-2),
            penalise=penalise,
            checkpoint=checkpoint,
            log=lambda metrics, step: losses.append(metrics["loss"]),
            **SETTINGS,
        )
    found = Resumed(losses, weights_of(model), len(restored[0]), warnings)
    for rank in range(distributed.world_size()) if remove else ():
        if distributed.rank() == rank:
            checkpoint.remove()
        distributed.meet()
    return found


def _in_bucket(uri: str, cache: Path) -> checkpoints.Checkpoint:
    from pipeline.storage.bucket import CACHE, Bucket

    os.environ[CACHE] = str(cache)  # Asked for again with every file.
    stage = Bucket(uri).root / "stages" / "train"
    stage.parent.mkdir(parents=True, exist_ok=True)
    return Bucket(uri).checkpoint(stage, "a task", 0.0)


def _copied(
    elsewhere: Path | None = None,
    seconds: float = 0.0,
    timeout: float | None = None,
    refused: str = "",
) -> dict[str, Any]:
    """How a checkpoint keeps copies in a folder.

    Each takes `seconds` on rank 0, in a group whose collectives have this timeout. A file of the
    name `refused` is not copied.
    """

    def copy(source: Path, target: Path) -> None:
        if source.name == refused:
            raise OSError(f"no copy of {refused}")
        if distributed.rank() == 0:
            time.sleep(seconds)
        target.unlink(missing_ok=True)
        if source.exists():
            shutil.copy(source, target)

    if timeout:
        torch.distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout))
    if elsewhere is None:
        return {}
    return {
        "download": lambda file: copy(elsewhere / file.name, file),
        "upload": lambda file: copy(file, elsewhere / file.name),
        "delete": lambda file: (elsewhere / file.name).unlink(missing_ok=True),
    }


def _failing(fails: Mapping[str, str]) -> AbstractContextManager[Any]:
    """Raise an error on writing a tensor file, by the end of its name."""
    write = checkpoints.tensor_file.write

    def checked(file: Path, *what: Any) -> None:
        for ending, message in fails.items():
            if file.name.endswith(ending):
                raise OSError(message)
        write(file, *what)

    return patch.object(checkpoints.tensor_file, "write", checked)


def saved(architecture: str, tokenizer: Any, folder: Path) -> dict[str, tuple[int, ...]]:
    """Write the model; return the shape of this rank's shard of every parameter."""
    model = model_of(architecture)
    models.save(model, tokenizer, folder)
    return {
        name: tuple(p.to_local().shape if sharding.is_sharded(model) else p.shape)
        for name, p in model.named_parameters()
    }


def stages_of(config: Any) -> None:
    """Run a config's missing training stages with a sharded model and a checkpoint per step."""
    from pipeline.execution.session import run_stages
    from pipeline.run import open_run
    from pipeline.stages.context import Context

    context = Context(shard_model=True, checkpoint_minutes=1e-9)
    run = open_run(config)
    resolved = [run.resolved[stage.name] for stage in run.plan.stages if stage.train]
    with as_often_as_asked():
        run_stages(resolved, context, lambda records: None)


def first_rows(heights: Sequence[int]) -> list[tuple[int, int]]:
    """For tensors of these many rows, the row that this rank's part begins with, and its height."""
    mesh, found = init_device_mesh("cpu", (distributed.world_size(),)), []
    for height in heights:
        whole = torch.arange(height)
        sharded = distribute_tensor(whole, mesh, [Shard(0)])
        first, own = sharding.first_row(sharded), sharding.local(sharded)
        assert torch.equal(own, whole[first : first + len(own)])
        found.append((first, len(own)))
    return found


def continued(prompts: Sequence[Sequence[int]], most: int, positions: int) -> list[list[int]]:
    """Continuations by a GPT-2 with few positions."""
    sizes = {"max_position_embeddings": positions, "n_positions": positions}
    model = model_of("GPT2LMHeadModel", **sizes)
    return generate(model, prompts, end=[], max_new_tokens=most, batch_size=1)
