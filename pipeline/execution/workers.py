"""Worker groups: processes that run one session after another, as the driver gives them.

Starting a Ray Train worker group costs more than many a session, so a group stays for the next one.
What the stages need is imported by those who run them: a process that starts workers is up sooner.
"""

import platform
import time
import traceback
import uuid
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import ray
from agcl.errors import InputError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.config.config import Resources
from pipeline.execution.cluster import needs, nodes, side_by_side
from pipeline.execution.failures import kernel_kills, why_lost
from pipeline.plan.stage import Session, Work
from pipeline.secrets import masked
from pipeline.storage import artifact, mirror

if TYPE_CHECKING:
    from pipeline.stages.context import Context, Emit

LOSSES = 3
"""Times that a session is lost at the same place before it counts as failed."""
_POLL_SECONDS = 0.2


def here() -> NodeAffinitySchedulingStrategy:
    """Places on the caller's node what must not be lost with another one."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


@ray.remote(num_cpus=0, max_retries=0)
def run_group(
    group: str, on_workers: bool, resources: Resources, mailbox: Any, scratch: Path
) -> None:
    """Run the sessions that the driver gives a group: on Ray Train workers, or else right here.

    `scratch` is a folder that all nodes see (or with an object store this one); Ray Train keeps its
    own records there. A group that loses a worker is started again and its session goes on at its
    first unfinished stage, until that was lost `LOSSES` times without finishing one or coming to
    another checkpoint of it. Where no node is left that could take its workers, it waits for
    `RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S` and fails.
    """

    def emit(records: list[Any]) -> None:
        # Waiting keeps records in order, and in hand before a failing worker dies.
        ray.get(mailbox.put.remote(records))

    losses, reached = 0, None
    while True:
        kills = kernel_kills()
        try:
            first = ray.get(mailbox.number_done.remote(group))
            if on_workers:
                _on_workers(group, first, resources, mailbox, emit, scratch)
            else:
                _right_here(group, first, mailbox, emit)
            return
        except Exception as error:
            left = _unfinished(group, mailbox)
            if not left:
                return
            if ray.get(mailbox.has_failed.remote({work.folder.name for work in left})):
                raise
            if _found_no_room(error):
                _check_room(resources, left[0], emit)
                continue
            before, reached = reached, _reached(left[0])
            losses = losses + 1 if reached == before else 1
            why = why_lost(error, kernel_killed=kernel_kills() > kills)
            record = {"artifact": left[0].folder.name, "state": "lost", "error": why}
            if losses == LOSSES:
                emit([{**record, "state": "failed", "traceback": masked(traceback.format_exc())}])
                raise
            emit([record])


def _right_here(group: str, first: int, mailbox: Any, emit: "Emit") -> None:
    from pipeline.stages.context import Context

    for session in _given(group, first, mailbox):
        _run(session, group, mailbox, Context(), emit)


def _run(session: Session, group: str, mailbox: Any, context: "Context", emit: "Emit") -> None:
    from pipeline.execution.session import run_works

    run_works(session.works, context, emit)
    if context.is_first_worker:
        ray.get(mailbox.finish.remote(group))


def _given(group: str, first: int, mailbox: Any) -> Iterator[Session]:
    """The group's sessions from that one on, as they come, until the driver ends it.

    Every worker of the group asks by itself: waiting for each other, they might time out.
    """
    for index in count(first):
        while (given := ray.get(mailbox.next.remote(group, index))) is None:
            time.sleep(_POLL_SECONDS)
        if not given:
            return
        yield ray.get(given[0])


def _unfinished(group: str, mailbox: Any) -> Sequence[Work]:
    """What is left of the session that a group is at work on."""
    given = ray.get(mailbox.next.remote(group, ray.get(mailbox.number_done.remote(group))))
    return [work for work in ray.get(given[0]).works if not work.is_complete()] if given else []


def _reached(work: Work) -> tuple[Path, int]:
    """How far a group is that has this stage to do next: something else after every step ahead.

    Compared for equality alone, as whoever writes the checkpoint may have another clock.
    """
    checkpoint = artifact.checkpoint_of(work.folder)
    if work.store:  # Its worker may be on another node.
        return work.folder, mirror.modified(work.store, checkpoint)
    return work.folder, checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0


def _on_workers(
    group: str, first: int, resources: Resources, mailbox: Any, emit: "Emit", scratch: Path
) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer, get_device

    from pipeline.execution.process_group import ReachableConfig

    def loop() -> None:
        import torch

        from pipeline.stages.context import Context

        torch.set_num_threads(resources.cpus_per_worker)
        for session in _given(group, first, mailbox):
            _check_scratch(scratch, session.works[0], emit)
            context = Context(
                get_device(),
                shard_model=resources.shard_model and resources.num_workers > 1,
                checkpoint_minutes=resources.checkpoint_minutes,
            )
            _run(session, group, mailbox, context, emit)
            del context  # With the model that it holds: the next session may be long in coming.
            torch.cuda.empty_cache()

    TorchTrainer(
        loop,
        scaling_config=ScalingConfig(
            num_workers=resources.num_workers,
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker=needs(resources),
        ),
        torch_config=ReachableConfig(backend="nccl" if resources.gpus_per_worker else "gloo"),
        run_config=RunConfig(
            name=f"group-{uuid.uuid4().hex[:8]}",
            storage_path=str(scratch),
            # Ray Train cannot tell a stage's own error, which comes again, from a lost worker.
            failure_config=FailureConfig(  # type: ignore[call-arg]
                max_failures=0, controller_failure_limit=0
            ),
        ),
    ).fit()


def _check_scratch(scratch: Path, work: Work, emit: "Emit") -> None:
    """Refuse to work on a node that does not see the folder that Ray Train made on the driver's."""
    if not work.store and not scratch.is_dir():
        why = f"storage: node {platform.node()} does not see {scratch.parent} of the driver's"
        _refuse(why, work, emit)


def _found_no_room(error: Exception) -> bool:
    from ray.train import ControllerError
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    return isinstance(error, ControllerError) and isinstance(
        error.controller_failure, WorkerGroupStartupTimeoutError
    )


def _check_room(resources: Resources, work: Work, emit: "Emit") -> None:
    """Refuse to go on if no node could take the workers even when nothing else runs."""
    try:
        side_by_side(resources, nodes())
    except InputError as error:
        _refuse(str(error), work, emit)


def _refuse(why: str, work: Work, emit: "Emit") -> NoReturn:
    emit([{"artifact": work.folder.name, "state": "failed", "error": why, "traceback": why}])
    raise InputError(why)
