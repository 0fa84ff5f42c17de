"""Runs the stages of a session in this process."""

import gc
import os
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

from agcl.errors import InputError
from agcl.parallel import distributed

from pipeline.config.hub import on_this_machine
from pipeline.execution.failures import explain, is_peer_loss
from pipeline.execution.stage_log import StageLog
from pipeline.plan.stage import ResolvedStage
from pipeline.secrets import masked
from pipeline.stages.context import Context, Emit, Record
from pipeline.stages.files import LOG_FILE
from pipeline.storage import artifact


def run_stages(stages: Sequence[ResolvedStage], context: Context, emit: Emit) -> None:
    """Run stages in order, each into its artifact, and skip complete ones.

    Collective: call on every rank. Rank 0 writes, and waits while another run makes the same
    artifact. Emits `{"artifact", "state"}` records: started, finished, or failed with `error` and
    `traceback`. If a rank is lost, neither it nor the other ranks emit a failure.
    """
    verified: set[Path] = set()
    for stage in stages:
        with _claimed(stage, emit) if context.is_rank_zero else nullcontext():
            with _emitting_failure(stage, emit):
                done = context.is_rank_zero and stage.storage.publish_left_over(
                    stage.folder, stage.fingerprint
                )
                distributed.meet()  # Rank 0 may have waited for another run, or uploaded.
                done = distributed.broadcast_object(done)
            if not done:
                _make(stage, context, emit, verified)
        if not done and context.is_rank_zero:
            # After the lock is released: who is told may not return for long, such as a trial that
            # Tune stops, and other trials may need the artifact.
            emit([{"artifact": stage.folder.name, "state": "finished"}])


def _claimed(stage: ResolvedStage, emit: Emit) -> AbstractContextManager[None]:
    """Lock the artifact while it is made; emit a note if another run holds the lock."""
    note = "waiting for another run that is computing it"
    waits: Record = {"artifact": stage.folder.name, "note": note}
    return artifact.claimed(stage.folder, on_wait=lambda: emit([waits]))


def _make(stage: ResolvedStage, context: Context, emit: Emit, verified: set[Path]) -> None:
    if context.is_rank_zero:
        emit([{"artifact": stage.folder.name, "state": "started"}])
    with _emitting_failure(stage, emit):
        fetched = {
            role: stage.storage.fetch(_here(stage, role), stage.reads) for role in stage.inputs
        }
        stage = replace(stage, inputs=fetched)
        _verify_inputs(stage, verified)
        distributed.meet()  # Downloads may outlast a collective's timeout.
        with _prepared(stage, context, emit) as out_dir:
            _check_given(stage, context)
            stage.fn(stage.config, stage.inputs, out_dir, context)
            _check_given(stage, context)  # The stage may have read a file that was being changed.
    if context.shard_model:
        gc.collect()  # Cycles would keep a sharded reference model while the next stage runs.
    verified.add(stage.folder)
    distributed.meet()  # Rank 0 writes and uploads the artifact.
    if context.checkpoint and not context.is_rank_zero:
        context.checkpoint.remove()  # This machine's parts of it.


@contextmanager
def _emitting_failure(stage: ResolvedStage, emit: Emit) -> Iterator[None]:
    """Emit why the stage failed before the error ends this worker."""
    try:
        yield
    except BaseException as error:
        if not is_peer_loss(error):
            said = {"error": explain(error, stage), "traceback": traceback.format_exc()}
            failed = {key: masked(text) for key, text in said.items()}
            emit([{"artifact": stage.folder.name, "state": "failed", **failed}])
        raise


def _here(stage: ResolvedStage, role: str) -> Path:
    """An input's path on this machine; what it lacks of a model on the hub is downloaded."""
    source = stage.given.get(role)
    return on_this_machine(stage.inputs[role], weights=source is None or source.has_weights)


def _verify_inputs(stage: ResolvedStage, verified: set[Path]) -> None:
    """Compare the input files with their recorded hashes, once per session."""
    # Rank 0 verifies a shared folder for all ranks. With a bucket, each machine has its own copy.
    if distributed.rank() == 0 or not stage.storage.shared:
        for folder in stage.inputs.values():
            if folder not in verified and (folder / artifact.MANIFEST).exists():
                artifact.verify(folder, stage.reads)
                if stage.reads is None:
                    verified.add(folder)


def _check_given(stage: ResolvedStage, context: Context) -> None:
    """Refuse a user's files that are not those the command hashed: the fingerprint would lie."""
    for role, source in stage.given.items() if context.is_rank_zero else ():
        if source.identity or source.has_weights:
            continue
        path = stage.inputs[role]
        if artifact.content_hash(path, source.patterns) != stage.record["inputs"][role]:
            raise InputError(
                f"{path} has changed since the command started, or differs between nodes; run the "
                "same command again"
            )


@contextmanager
def _prepared(stage: ResolvedStage, context: Context, emit: Emit) -> Iterator[Path]:
    """Give the context its log and checkpoint, and yield the folder to write into.

    On leaving normally, rank 0 publishes the artifact.
    """
    seconds = 60 * context.checkpoint_minutes
    checkpoint = (
        stage.storage.checkpoint(stage.folder, stage.fingerprint, seconds) if seconds else None
    )
    context.folder, context.checkpoint = stage.folder, checkpoint
    context.warn = lambda line: emit([{"artifact": stage.folder.name, "warning": masked(line)}])
    if checkpoint:
        checkpoint.warn = context.warn
    if checkpoint and context.is_rank_zero:
        checkpoint.resumed = lambda metrics, step: emit([_resumed(stage, metrics, step)])
    if not context.is_rank_zero:
        context.log = lambda metrics, step: None
        try:
            yield Path(os.devnull)
        except ArithmeticError:
            if checkpoint:
                checkpoint.remove()
            raise
        return
    with artifact.writing(stage.folder, stage.record) as out_dir:
        log = StageLog(stage.folder.name, out_dir / LOG_FILE, emit)
        context.log = log
        try:
            yield out_dir
        except ArithmeticError:
            if checkpoint:
                checkpoint.remove()  # Deterministic failure: resuming would reproduce it.
            raise
        finally:
            log.close()
    stage.storage.publish(stage.folder)
    if checkpoint:
        checkpoint.remove()


def _resumed(stage: ResolvedStage, metrics: Mapping[str, float], step: int) -> Record:
    """A note for the user that says after which step training resumes."""
    total = metrics.get("of_steps")
    note = f"resumes after step {step}" + f" of {total}" * bool(total)
    return {"artifact": stage.folder.name, "note": note}
