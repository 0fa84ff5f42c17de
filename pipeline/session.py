"""Running a session's stages: in this process, in a Ray task, or on Ray Train workers."""

import os
import platform
import traceback
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import ray
import torch
from agcl import distributed
from agcl.checkpoint import Checkpoint
from agcl.errors import InputError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline import artifact, mirror
from pipeline.cluster import needs, nodes, side_by_side
from pipeline.config import Resources
from pipeline.dag import Session, Work
from pipeline.failures import explain, kernel_kills, misses_others, why_lost
from pipeline.secrets import masked
from pipeline.stages.context import LOG_FILE, Context, Emit, StageLog
from pipeline.stored_checkpoint import StoredCheckpoint

LOSSES = 3
"""Times that a session is lost at the same place before it counts as failed."""


def run_works(works: Sequence[Work], context: Context, emit: Emit) -> None:
    """Run stages one after the other, each into its artifact; skip the complete ones.

    Called by every worker of a session; the first one writes, and waits where another run makes
    the same artifact. Emits `{"artifact", "state"}` records: started, finished, or failed with
    `error` and `traceback`. A worker that was lost says nothing, and nor do those that miss it.
    """
    checked: set[Path] = set()
    for work in works:
        with artifact.claimed(work.folder) if context.is_first_worker else nullcontext():
            distributed.barrier()
            with _failing(work, emit):
                is_complete = distributed.broadcast_object(
                    _is_complete(work) if context.is_first_worker else False
                )
            if not is_complete:
                _make(work, context, emit, checked)


def _is_complete(work: Work) -> bool:
    """Whether the artifact is there, once one whose upload was cut off is uploaded."""
    if work.is_complete():
        return True
    if not work.store or not artifact.is_complete(work.folder, work.fingerprint):
        return False
    artifact.verify(work.folder)
    mirror.push(work.store, work.folder)
    return True


def _make(work: Work, context: Context, emit: Emit, checked: set[Path]) -> None:
    if context.is_first_worker:
        emit([{"artifact": work.folder.name, "state": "started"}])
    with _failing(work, emit):
        if work.store:
            work = replace(work, inputs=_fetched_inputs(work, work.store))
        _verify_inputs(work, checked)
        _run_one(work, context, emit)
    checked.add(work.folder)
    distributed.barrier()
    if context.is_first_worker:
        emit([{"artifact": work.folder.name, "state": "finished"}])


@contextmanager
def _failing(work: Work, emit: Emit) -> Iterator[None]:
    """Emit why a stage fails, if it does, before the worker ends of it."""
    try:
        yield
    except BaseException as error:
        if not misses_others(error):
            said = {"error": explain(error, work), "traceback": traceback.format_exc()}
            failed = {key: masked(text) for key, text in said.items()}
            emit([{"artifact": work.folder.name, "state": "failed", **failed}])
        raise


def _fetched_inputs(work: Work, store: str) -> dict[str, Path]:
    """The stage's inputs, downloaded as far as this worker's machine lacks them."""
    return {
        role: mirror.fetch(store, path, work.reads)
        if path.parent == work.folder.parent  # Else it is a file or folder of the user's.
        else path
        for role, path in work.inputs.items()
    }


def _verify_inputs(work: Work, checked: set[Path]) -> None:
    """Compare the contents of artifacts that are read for the first time in this session."""
    if distributed.rank() == 0 or work.store:  # Copies from a store may be this machine's own.
        for folder in work.inputs.values():
            if folder not in checked and (folder / artifact.MANIFEST).exists():
                artifact.verify(folder, work.reads)
                if work.reads is None:
                    checked.add(folder)


def _run_one(work: Work, context: Context, emit: Emit) -> None:
    context.folder = work.folder
    checkpoint = _checkpoint_of(work, context)
    context.checkpoint = checkpoint
    if not context.is_first_worker:
        context.log = lambda metrics, step: None
        work.fn(work.config, work.inputs, Path(os.devnull), context)
        return
    with artifact.writing(work.folder, work.record) as out_dir:
        log = StageLog(work.folder.name, out_dir / LOG_FILE, emit)
        context.log = log
        try:
            work.fn(work.config, work.inputs, out_dir, context)
        except ArithmeticError:
            if checkpoint:
                checkpoint.remove()  # It would come to the same again.
            raise
        finally:
            log.close()
    if work.store:
        mirror.push(work.store, work.folder)
    if checkpoint:
        checkpoint.remove()


def _checkpoint_of(work: Work, context: Context) -> Checkpoint | None:
    seconds = 60 * context.checkpoint_minutes
    file = artifact.checkpoint_of(work.folder)
    if not seconds:
        return None
    if work.store:
        return StoredCheckpoint(file, work.fingerprint, seconds, work.store)
    return Checkpoint(file, work.fingerprint, seconds)


@ray.remote(num_cpus=0)
class Mailbox:
    """Carries records from workers to the driver while a run is under way."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.failed: set[str] = set()

    def put(self, records: list[dict[str, Any]]) -> None:
        """Add records."""
        self.records += records
        self.failed |= {each["artifact"] for each in records if each.get("state") == "failed"}

    def take(self) -> list[dict[str, Any]]:
        """All records since the last call."""
        records, self.records = self.records, []
        return records

    def has_failed(self, artifacts: set[str]) -> bool:
        """Whether a stage that makes one of them failed, so far."""
        return bool(self.failed & artifacts)


def here() -> NodeAffinitySchedulingStrategy:
    """Places on the caller's node what must not be lost with another one."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


@ray.remote(num_cpus=0, max_retries=0)
def run_session(session: Session, resources: Resources, mailbox: Any, scratch: Path) -> None:
    """Run one session: on a Ray Train worker group if it trains, else right here.

    `scratch` is a folder that all nodes see (or with an object store this one); Ray Train keeps its
    own records there. A session that loses a worker is started again and goes on at its first
    unfinished stage, until it was lost `LOSSES` times without finishing one or coming to another
    checkpoint of it. Where no node is left that could take its workers, it waits for
    `RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S` and fails.
    """

    def emit(records: list[Any]) -> None:
        # Waiting keeps records in order, and in hand before a failing worker dies.
        ray.get(mailbox.put.remote(records))

    folders = {work.folder.name for work in session.works}
    losses, reached = 0, _reached(session.works)
    while True:
        kills = kernel_kills()
        try:
            if session.train:
                _on_workers(session, resources, emit, scratch)
            else:
                run_works(session.works, Context(), emit)
            return
        except Exception as error:
            left = [work for work in session.works if not work.is_complete()]
            if not left:
                return
            if ray.get(mailbox.has_failed.remote(folders)):
                raise
            if _found_no_room(error):
                _check_room(resources, left[0], emit)
                continue
            before, reached = reached, _reached(left)
            losses = losses + 1 if reached == before else 1
            why = why_lost(error, kernel_killed=kernel_kills() > kills)
            record = {"artifact": left[0].folder.name, "state": "lost", "error": why}
            if losses == LOSSES:
                emit([{**record, "state": "failed", "traceback": masked(traceback.format_exc())}])
                raise
            emit([record])


def _reached(left: Sequence[Work]) -> tuple[int, int]:
    """How far a session is that has these stages left: something else after every step ahead.

    Compared for equality alone, as whoever writes the checkpoint may have another clock.
    """
    checkpoint = artifact.checkpoint_of(left[0].folder)
    if store := left[0].store:  # Its worker may be on another node.
        return -len(left), mirror.modified(store, checkpoint)
    return -len(left), checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0


def _on_workers(session: Session, resources: Resources, emit: Emit, scratch: Path) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer, get_device

    from pipeline.process_group import ReachableConfig

    def loop() -> None:
        # Ray Train made the folder, on the driver's node.
        if not session.works[0].store and not scratch.is_dir():
            why = f"storage: node {platform.node()} does not see {scratch.parent} of the driver's"
            _refuse(why, session.works[0], emit)
        torch.set_num_threads(resources.cpus_per_worker)
        context = Context(
            get_device(),
            shard_model=resources.shard_model and resources.num_workers > 1,
            checkpoint_minutes=resources.checkpoint_minutes,
        )
        run_works(session.works, context, emit)

    TorchTrainer(
        loop,
        scaling_config=ScalingConfig(
            num_workers=resources.num_workers,
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker=needs(resources),
        ),
        torch_config=ReachableConfig(backend="nccl" if resources.gpus_per_worker else "gloo"),
        run_config=RunConfig(
            name=f"session-{uuid.uuid4().hex[:8]}",
            storage_path=str(scratch),
            # Ray Train cannot tell a stage's own error, which comes again, from a lost worker.
            failure_config=FailureConfig(  # type: ignore[call-arg]
                max_failures=0, controller_failure_limit=0
            ),
        ),
    ).fit()


def _found_no_room(error: Exception) -> bool:
    from ray.train import ControllerError
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    return isinstance(error, ControllerError) and isinstance(
        error.controller_failure, WorkerGroupStartupTimeoutError
    )


def _check_room(resources: Resources, work: Work, emit: Emit) -> None:
    """Refuse to go on if no node could take the workers even when nothing else runs."""
    try:
        side_by_side(resources, nodes())
    except InputError as error:
        _refuse(str(error), work, emit)


def _refuse(why: str, work: Work, emit: Emit) -> NoReturn:
    emit([{"artifact": work.folder.name, "state": "failed", "error": why, "traceback": why}])
    raise InputError(why)
