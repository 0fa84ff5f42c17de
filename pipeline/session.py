"""Running a session's stages: in this process, in a Ray task, or on Ray Train workers."""

import os
import traceback
import uuid
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import ray
import torch
from agcl import distributed

from pipeline import artifact
from pipeline.config import Resources
from pipeline.dag import Session, Work
from pipeline.secrets import masked
from pipeline.stages.context import LOG_FILE, Context, Emit, StageLog


def run_works(works: Sequence[Work], context: Context, emit: Emit) -> None:
    """Run stages one after the other, each into its artifact; skip the complete ones.

    Called by every worker of a session; the first one writes, and waits where another run makes
    the same artifact. Emits `{"artifact", "state"}` records: started, finished, or failed with
    `error` and `traceback`.
    """
    checked: set[Path] = set()
    for work in works:
        with artifact.claimed(work.folder) if context.is_first_worker else nullcontext():
            distributed.barrier()
            is_complete = work.is_complete()
            distributed.barrier()  # Before the first worker can complete it.
            if not is_complete:
                _make(work, context, emit, checked)


def _make(work: Work, context: Context, emit: Emit, checked: set[Path]) -> None:
    if context.is_first_worker:
        emit([{"artifact": work.folder.name, "state": "started"}])
    try:
        _verify_inputs(work, checked)
        _run_one(work, context, emit)
    except BaseException as error:
        said = {"error": explain(error, work), "traceback": traceback.format_exc()}
        failed = {key: masked(text) for key, text in said.items()}
        emit([{"artifact": work.folder.name, "state": "failed", **failed}])
        raise
    checked.add(work.folder)
    distributed.barrier()
    if context.is_first_worker:
        emit([{"artifact": work.folder.name, "state": "finished"}])


def explain(error: BaseException, work: Work) -> str:
    """One line for the user."""
    if "No space left on device" in str(error):
        return f"no space left on device for {work.folder}"
    if isinstance(error, OSError) and error.errno is not None:
        return f"{os.strerror(error.errno)}: {error.filename or work.folder}"
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return (
            "out of memory: lower training.micro_batch_size, importance.batch_size or "
            f"evaluation.batch_size ({error})"
        )
    text = " ".join(str(error).split())
    return (
        text
        if isinstance(error, ValueError | ArithmeticError)
        else f"{type(error).__name__}: {text}"
    )


def _verify_inputs(work: Work, checked: set[Path]) -> None:
    """Compare the contents of artifacts that are read for the first time in this session."""
    if distributed.rank() == 0:
        for folder in work.inputs.values():
            if folder not in checked and (folder / artifact.MANIFEST).exists():
                artifact.verify(folder)
                checked.add(folder)


def _run_one(work: Work, context: Context, emit: Emit) -> None:
    context.folder = work.folder
    if not context.is_first_worker:
        context.log = lambda metrics, step: None
        work.fn(work.config, work.inputs, Path(os.devnull), context)
        return
    with artifact.writing(work.folder, work.record) as out_dir:
        log = StageLog(work.folder.name, out_dir / LOG_FILE, emit)
        context.log = log
        try:
            work.fn(work.config, work.inputs, out_dir, context)
        finally:
            log.close()


@ray.remote(num_cpus=0)
class Mailbox:
    """Carries records from workers to the driver while a run is under way."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def put(self, records: list[dict[str, Any]]) -> None:
        """Add records."""
        self.records += records

    def take(self) -> list[dict[str, Any]]:
        """All records since the last call."""
        records, self.records = self.records, []
        return records


@ray.remote(num_cpus=0, max_retries=0)
def run_session(session: Session, resources: Resources, mailbox: Any, scratch: Path) -> None:
    """Run one session: on a Ray Train worker group if it trains, else right here.

    `scratch` is a folder that all nodes see; Ray Train keeps its own records there.
    """

    def emit(records: list[Any]) -> None:
        # Waiting keeps records in order, and in hand before a failing worker dies.
        ray.get(mailbox.put.remote(records))

    if not session.train:
        run_works(session.works, Context(), emit)
        return

    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer, get_device

    def loop() -> None:
        torch.set_num_threads(resources.cpus_per_worker)
        run_works(session.works, Context(device=get_device()), emit)

    TorchTrainer(
        loop,
        scaling_config=ScalingConfig(
            num_workers=resources.num_workers,
            use_gpu=resources.use_gpu,
            resources_per_worker={
                "CPU": resources.cpus_per_worker,
                **({"GPU": 1} if resources.use_gpu else {}),
            },
        ),
        torch_config=TorchConfig(backend="nccl" if resources.use_gpu else "gloo"),
        run_config=RunConfig(name=f"session-{uuid.uuid4().hex[:8]}", storage_path=str(scratch)),
    ).fit()
