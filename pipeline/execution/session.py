"""Running a session's stages one after the other in this process, each into its artifact."""

import os
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

from agcl.files.checkpoint import Checkpoint
from agcl.parallel import distributed

from pipeline.execution.failures import explain, misses_others
from pipeline.plan.stage import Work
from pipeline.secrets import masked
from pipeline.stages.context import Context, Emit, StageLog
from pipeline.stages.files import LOG_FILE
from pipeline.storage import artifact, mirror
from pipeline.storage.checkpoint import StoredCheckpoint


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
