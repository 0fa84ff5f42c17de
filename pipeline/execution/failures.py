"""What is said of a failure, in one line, and whose failure it was.

Imports torch where a stage's error is looked at: the processes that start workers need none of it.
"""

import os
import traceback
from contextlib import suppress
from pathlib import Path

import ray

from pipeline.plan.stage import ResolvedStage
from pipeline.secrets import masked
from pipeline.storage.object_store import StoreFailed

LESS_MEMORY = (
    "set training.activation_checkpointing, or lower training.micro_batch_size, "
    "importance.batch_size, importance.top_k or evaluation.batch_size, or share the model among "
    "workers by resources.shard_model"
)
_NO_MEMORY = (
    "can't allocate memory",
    "Cannot allocate memory",
    "std::bad_alloc",
    "CUDA error: out of memory",
    "ALLOC_FAILED",
)
"""How torch, the system and CUDA's libraries say it, by errors of many types."""


def explain(error: BaseException, stage: ResolvedStage) -> str:
    """One line for the user."""
    import torch

    if "No space left on device" in str(error):
        return f"no space left on device for {stage.folder}"
    if isinstance(error, StoreFailed):
        return str(error)
    text = " ".join(str(error).split())
    said = any(words in text for words in _NO_MEMORY)
    if said or isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return f"out of memory: {LESS_MEMORY} ({text})"
    if isinstance(error, OSError) and error.errno is not None:
        return f"{os.strerror(error.errno)}: {error.filename or stage.folder}"
    return (
        text
        if isinstance(error, ValueError | ArithmeticError)
        else f"{type(error).__name__}: {text}"
    )


def why_lost(error: BaseException, *, kernel_killed: bool = False) -> str:
    """One line for the user on workers that are gone, or that could not be asked after."""
    if isinstance(error, StoreFailed):  # Of a Ray task's, Ray's error is one too.
        return str(getattr(error, "cause", error))
    # Ray's monitor of the node's memory; Ray Train tells of it in a cause only.
    if kernel_killed or "running low on memory" in "".join(traceback.format_exception(error)):
        return f"out of memory, its workers were killed: {LESS_MEMORY}"
    reason = " ".join(str(error).split())[-300:]
    return masked(f"its workers were lost; if they ran out of memory, {LESS_MEMORY} ({reason})")


def is_peer_loss(error: BaseException) -> bool:
    """Whether the error comes from losing another process, not from this stage."""
    import torch

    if isinstance(error, ray.exceptions.RayError):
        own = (ray.exceptions.RayTaskError, ray.exceptions.TaskCancelledError)
        return not isinstance(error, own)
    # gloo tells of a closed connection by a plain RuntimeError.
    return isinstance(error, torch.distributed.DistError) or (
        type(error) is RuntimeError and "gloo" in str(error)
    )


def kernel_kills() -> int:
    """How many processes the kernel of this machine has killed for want of memory."""
    with suppress(OSError, ValueError):
        counters = Path("/proc/vmstat").read_text().split()
        return int(counters[counters.index("oom_kill") + 1])
    return 0
