"""One-line explanations of failures, and whether a stage or a lost process caused them.

Functions import torch themselves, because the processes that start workers do not need it.
"""

import os
import traceback
from contextlib import suppress
from pathlib import Path

import ray
from agcl.errors import one_line

from pipeline.plan.stage import ResolvedStage
from pipeline.secrets import masked
from pipeline.storage.object_store import StoreFailed

LESS_MEMORY = (
    "set training.activation_checkpointing, or lower training.max_tokens, "
    "importance.batch_size, importance.top_k or evaluation.batch_size, or shard the model across "
    "workers with resources.shard_model"
)
_NO_MEMORY = (
    "can't allocate memory",
    "Cannot allocate memory",
    "std::bad_alloc",
    "CUDA error: out of memory",
    "ALLOC_FAILED",
)
"""Messages of torch, the operating system and CUDA libraries; the error types vary."""


def explain(error: BaseException, stage: ResolvedStage) -> str:
    """An error of a stage as one line for the user."""
    import torch

    if "No space left on device" in str(error):
        return f"no space left on device for {stage.folder}"
    if isinstance(error, StoreFailed):
        return str(error)
    text = one_line(error)
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
    """The loss of workers, or of contact with them, as one line for the user."""
    if isinstance(error, StoreFailed):  # Ray's wrapper of a task's error also has its type.
        return str(getattr(error, "cause", error))
    # Killed by Ray's memory monitor, which Ray Train mentions only in the cause.
    if kernel_killed or "running low on memory" in "".join(traceback.format_exception(error)):
        return f"out of memory, its workers were killed: {LESS_MEMORY}"
    reason = one_line(error)[-300:]
    return masked(f"its workers were lost; if they ran out of memory, {LESS_MEMORY} ({reason})")


def is_peer_loss(error: BaseException) -> bool:
    """Whether the error comes from losing another process, not from this stage."""
    import torch

    if isinstance(error, ray.exceptions.RayError):
        own = (ray.exceptions.RayTaskError, ray.exceptions.TaskCancelledError)
        return not isinstance(error, own)
    # gloo reports a closed connection as a plain RuntimeError.
    return isinstance(error, torch.distributed.DistError) or (
        type(error) is RuntimeError and "gloo" in str(error)
    )


def kernel_kills() -> int:
    """Number of processes that this machine's kernel has killed for lack of memory."""
    with suppress(OSError, ValueError):
        counters = Path("/proc/vmstat").read_text().split()
        return int(counters[counters.index("oom_kill") + 1])
    return 0
