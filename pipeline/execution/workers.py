"""Groups of workers: processes that take sessions from the mailbox and run them.

Starting a Ray Train worker group often takes longer than a session, so a group stays for the next
session. Functions that run stages import torch and the stages when called: the process that starts
the workers needs neither, and is ready sooner without them.
"""

import platform
import signal
import time
import traceback
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import ray
from agcl.errors import InputError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.config.resources import Resources
from pipeline.execution.cluster import nodes, side_by_side, worker_resources
from pipeline.execution.failures import kernel_kills, why_lost
from pipeline.plan.schedule import Session
from pipeline.plan.stage import ResolvedStage
from pipeline.secrets import masked

if TYPE_CHECKING:
    from pipeline.stages.context import Emit

LOSSES = 3
"""A session that is lost this many times at the same place has failed."""
_POLL_SECONDS = 0.2


def here() -> NodeAffinitySchedulingStrategy:
    """Schedule on the caller's node, so that the loss of any other node does no harm."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


@ray.remote(num_cpus=0, max_retries=0)
def run_group(group: str, train: bool, resources: Resources, mailbox: Any, scratch: Path) -> None:
    """Take sessions from the mailbox and run them on Ray Train workers, or in this process.

    `scratch` is a folder for Ray Train's own files that all nodes see; with a bucket, only this
    node needs it. A group that loses a worker restarts, and its session resumes at the first
    unfinished stage. The session fails after `LOSSES` losses in a row without a new stage or
    checkpoint. If this process itself is lost, the driver queues its session again. If the workers
    do not start within `RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S`, the session fails if they could
    never fit on the cluster; otherwise the group keeps waiting.
    """

    def emit(records: list[Any]) -> None:
        # Waiting keeps the records in order and delivers them before a failing worker exits.
        ray.get(mailbox.put.remote(records))

    losses, marker = 0, None
    while True:
        kills = kernel_kills()
        try:
            first = ray.get(mailbox.number_done.remote(group))
            if train:
                _on_workers(group, first, resources, mailbox, emit, scratch)
            else:
                _in_this_process(group, first, mailbox, emit)
            return
        except Exception as error:
            left = _unfinished(group, train, mailbox)
            if not left:
                return
            if ray.get(mailbox.has_failed.remote({stage.folder.name for stage in left})):
                raise
            if _found_no_room(error):
                _check_room(resources, left[0], emit)
                continue
            before, marker = marker, progress_marker(left[0])
            losses = losses + 1 if marker == before else 1
            why = why_lost(error, kernel_killed=kernel_kills() > kills)
            record = {"artifact": left[0].folder.name, "state": "lost", "error": why}
            if losses == LOSSES:
                emit([{**record, "state": "failed", "traceback": masked(traceback.format_exc())}])
                raise
            emit([record])


def _in_this_process(group: str, first: int, mailbox: Any, emit: "Emit") -> None:
    from pipeline.execution.session import run_stages
    from pipeline.stages.context import Context

    for session in _sessions(group, False, first, mailbox):
        run_stages(session.stages, Context(), emit)
        ray.get(mailbox.finish.remote(group))


def _sessions(group: str, train: bool, first: int, mailbox: Any) -> Iterator[Session]:
    """Sessions of the group as they become ready, starting with number `first`.

    Every rank polls the mailbox itself, because waiting in a collective could time out.
    """
    for index in count(first):
        while (taken := ray.get(mailbox.next.remote(group, train, index))) is None:
            time.sleep(_POLL_SECONDS)
        if not taken:
            return
        yield ray.get(taken[0])


def _unfinished(group: str, train: bool, mailbox: Any) -> Sequence[ResolvedStage]:
    """Unfinished stages of the session that the group is running or would run next.

    Marks a session as finished if its workers were lost right after publishing its last artifact.
    Otherwise, the sessions that depend on it would wait forever.
    """
    while True:
        done = ray.get(mailbox.number_done.remote(group))
        taken = ray.get(mailbox.next.remote(group, train, done))
        if not taken:
            return []
        if left := [stage for stage in ray.get(taken[0]).stages if not stage.is_complete()]:
            return left
        ray.get(mailbox.finish.remote(group))


def progress_marker(stage: ResolvedStage) -> tuple[Path, int]:
    """Changes with every finished stage or checkpoint; compare for equality only."""
    return stage.folder, stage.storage.checkpoint_time(stage.folder)


def _on_workers(
    group: str,
    first: int,
    resources: Resources,
    mailbox: Any,
    emit: "Emit",
    scratch: Path,
) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer, get_device

    from pipeline.execution.torch_backend import config_of

    def loop() -> None:
        import torch

        from pipeline.execution.session import run_stages
        from pipeline.stages.context import Context

        torch.set_num_threads(resources.cpus_per_worker)
        for session in _sessions(group, True, first, mailbox):
            _check_scratch(scratch, session.stages[0], emit)
            context = Context(
                get_device(),
                shard_model=resources.shard_model and resources.num_workers > 1,
                checkpoint_minutes=resources.checkpoint_minutes,
            )
            run_stages(session.stages, context, emit)
            if context.is_rank_zero:
                ray.get(mailbox.finish.remote(group))
            del context  # Frees the model while waiting for the next session.
            torch.cuda.empty_cache()

    trainer = TorchTrainer(
        loop,
        scaling_config=ScalingConfig(
            num_workers=resources.num_workers,
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker=worker_resources(resources),
        ),
        torch_config=config_of(resources),
        run_config=RunConfig(
            name=f"group-{uuid.uuid4().hex[:8]}",
            storage_path=str(scratch),
            # Restarts are ours: Ray Train cannot tell an error of a stage, which would recur, from
            # the loss of a worker.
            failure_config=FailureConfig(  # type: ignore[call-arg]
                max_failures=0, controller_failure_limit=0
            ),
        ),
    )
    with _interrupts_as_before():
        trainer.fit()


@contextmanager
def _interrupts_as_before() -> Iterator[None]:
    """Restore the SIGINT handler that Ray Train replaces and leaves behind.

    Ray Train's handler references the controller of the workers. The controller would stay alive
    and hold the CPUs of workers that failed to start, so the next group could not have them.
    """
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)


def _check_scratch(scratch: Path, stage: ResolvedStage, emit: "Emit") -> None:
    """Fail if this node does not see the folder that Ray Train made on the driver's node."""
    if stage.storage.shared and not scratch.is_dir():
        why = f"storage: node {platform.node()} does not see {scratch.parent} of the driver's node"
        _refuse(why, stage, emit)


def _found_no_room(error: Exception) -> bool:
    from ray.train import ControllerError
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    return isinstance(error, ControllerError) and isinstance(
        error.controller_failure, WorkerGroupStartupTimeoutError
    )


def _check_room(resources: Resources, stage: ResolvedStage, emit: "Emit") -> None:
    """Fail if the workers would not fit even with nothing else running; else wait longer."""
    try:
        side_by_side(resources, nodes())
    except InputError as error:
        _refuse(str(error), stage, emit)
    emit([{"artifact": stage.folder.name, "note": "still waiting for room for its workers"}])


def _refuse(why: str, stage: ResolvedStage, emit: "Emit") -> NoReturn:
    emit([{"artifact": stage.folder.name, "state": "failed", "error": why, "traceback": why}])
    raise InputError(why)
