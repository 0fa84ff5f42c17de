"""A trial: a run of the config with other settings. What runs in its process, and its record."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any, Literal

import pyarrow as pa
import torch
from agcl.metrics import Matrix
from ray import tune

from pipeline.config.sources import BASE_TASK
from pipeline.execution.scheduler import SCRATCH, run_sessions
from pipeline.execution.session import run_stages
from pipeline.plan.plan import Run
from pipeline.plan.schedule import sessions
from pipeline.stages.context import Context, Emit, Record
from pipeline.stages.files import BASE_KNOWLEDGE, SCORES

State = Literal["running", "finished", "stopped", "failed"]
_SCHEMA = pa.schema(
    [
        ("trial", pa.int32()),
        ("state", pa.string()),
        ("task", pa.int32()),
        *(
            (name, pa.float64())
            for name in ("average", "learned", "retained", "base_kept", "seconds")
        ),
        ("reason", pa.string()),
    ]
)


@dataclass(frozen=True)
class Progress:
    """Scores after a task: means over the evaluation sets, on validation rows, in [0, 1]."""

    average: float
    """Mean current score of the tasks so far."""
    learned: float
    """Mean score of the tasks so far, each right after its own training."""
    retained: float | None
    """Mean current score of all earlier tasks; None after the first task."""
    base_kept: float | None = None
    """What the base model still knows, higher is better: its score on the built-in model's facts,
    otherwise minus the loss on `evaluation.text`, in nats per token; None without either."""


@dataclass(frozen=True)
class Trial:
    """One point of the search space and its result."""

    number: int
    """From 0, in the order in which points were chosen."""
    settings: Mapping[str, Any]
    """Values by dotted config key."""
    state: State = "running"
    """`stopped`: ended early because other trials were better."""
    progress: tuple[Progress, ...] = ()
    """After each task so far."""
    seconds: float = 0.0
    """Compute time of the stages that no other trial has."""
    reason: str | None = None
    """Why it failed."""

    @property
    def last(self) -> Progress | None:
        """The latest scores; None before the first task."""
        return self.progress[-1] if self.progress else None


def run_trial(run: Run, shared: Collection[str]) -> None:
    """Run a trial's missing stages; report to Tune after each task. Called in a Tune process.

    `shared` names the artifacts whose compute time is not the trial's. A stage that fails ends the
    trial with a last report of `reason` and `traceback`, so that Tune does not retry it. Lost
    workers raise, and Tune does retry.
    """
    catch_up = _reporter(run, shared)
    failures: list[Record] = []

    def observe(records: list[Record]) -> None:
        failures.extend(record for record in records if record.get("state") == "failed")
        if any(record.get("state") == "finished" for record in records):
            catch_up()

    catch_up()
    try:
        _run_stages(run, observe)
        if not failures:
            catch_up()  # Stages that another process finished meanwhile leave no record here.
    except Exception:
        if not failures:  # The process or its workers were lost.
            raise
    if failures:
        stages = {stage.folder.name: name for name, stage in run.resolved.items()}
        failed = failures[0]
        reason = f"stage {stages[str(failed['artifact'])]}: {failed['error']}"
        tune.report({"reason": reason, "traceback": failed["traceback"]})


def _reporter(run: Run, shared: Collection[str]) -> Callable[[], None]:
    """A function that reports to Tune every task that was finished since its last call."""
    tasks, stages = run.plan.tasks, run.resolved
    own = [stage for stage in stages.values() if stage.folder.name not in shared]
    scored = [stage for name, stage in stages.items() if name.startswith("evaluate/")]
    scored += scored[-1:] * (len(tasks) + 1 - len(scored))  # `joint`: once, for all tasks.
    facts = BASE_TASK if run.config.model.is_builtin else None
    rows: list[Mapping[str, Mapping[str, float]]] = []

    def catch_up() -> None:
        for stage in scored[len(rows) :]:
            if not stage.is_complete():
                return
            rows.append(json.loads(stage.read(SCORES) or b""))
            if len(rows) > 1:
                manifests = [stage.manifest() for stage in own if stage.is_complete()]
                seconds = round(sum(float(each["seconds"]) for each in manifests if each), 3)
                scores = progress_after(rows, tasks, alone=run.config.method == "solo")
                kept = base_kept(rows[-1], facts, json.loads(stage.read(BASE_KNOWLEDGE) or b""))
                scores = replace(scores, base_kept=kept)
                tune.report({"task": len(rows) - 1, "seconds": seconds, **asdict(scores)})

    return catch_up


def _run_stages(run: Run, observe: Emit) -> None:
    """In this process, or on several workers. Raises if a stage fails or a process is lost."""
    resources = run.config.resources
    if resources.num_workers > 1:
        todo = sessions({run.config.name: run.plan.stages}, run.config.storage)
        for failure in run_sessions(todo, run.folder / SCRATCH, resources, 1, observe):
            raise failure
        return
    torch.set_num_threads(resources.cpus_per_worker)
    device = torch.device("cuda" if resources.gpus_per_worker else "cpu")
    context = Context(device, checkpoint_minutes=resources.checkpoint_minutes)
    run_stages(list(run.resolved.values()), context, observe)


def progress_after(
    rows: Sequence[Mapping[str, Mapping[str, float]]], tasks: Sequence[str], *, alone: bool = False
) -> Progress:
    """The scores after the last task so far.

    `rows` are the scores by task and evaluation set, of the base model and after every task so far.
    With `alone` each task is answered by the model that was trained on it alone.
    """
    done = len(rows) - 1
    matrices: list[Matrix] = [
        [[row[task][name] for task in tasks] for row in rows]
        for name in rows[0][tasks[0]]
        if all(name in rows[0][task] for task in tasks)
    ]
    learned = [[m[i + 1][i] for i in range(done)] for m in matrices]
    now = learned if alone else [m[-1][:done] for m in matrices]
    return Progress(
        average=fmean(map(fmean, now)),
        learned=fmean(map(fmean, learned)),
        retained=fmean(fmean(scores[:-1]) for scores in now) if done > 1 else None,
    )


def base_kept(
    scores: Mapping[str, Mapping[str, float]], facts: str | None, kept: Mapping[str, Any]
) -> float | None:
    """What the base model still knows, as `Progress` has it, from an evaluation's two files."""
    if facts:
        return next(iter(scores[facts].values()))
    return -float(kept["text_loss"]) if "text_loss" in kept else None


def best(trials: Sequence[Trial], *, keep_base: bool = False) -> Trial | None:
    """The finished trial with the highest average, the first of equals; None if none finished.

    With `keep_base`, of those that keep at least as much of the base model as trial 0, the config's
    own settings, if that finished.
    """
    finished = [(t.last.average, -t.number, t) for t in trials if t.state == "finished" and t.last]
    # All trials measure it or none does: their evaluations are alike.
    scored = ((t.number, t.last.base_kept) for *_, t in finished if t.last)
    kept = {number: score for number, score in scored if score is not None}
    if keep_base and 0 in kept:
        finished = [each for each in finished if kept[each[-1].number] >= kept[0]]
    return max(finished)[-1] if finished else None


def unbounded(trials: Sequence[Trial]) -> str | None:
    """What to say if nothing bounds how little of the base the best trial keeps; else None."""
    if any(trial.number == 0 and trial.state == "finished" for trial in trials):
        return None
    return (
        "trial 0 did not finish, so it is unknown what the config's own settings keep of the base "
        "model: the best trial has the highest average, however little it keeps"
    )


def undecided(trials: Sequence[Trial]) -> str | None:
    """What to say if several trials finished and all have the same average; else None."""
    averages = [t.last.average for t in trials if t.state == "finished" and t.last]
    if len(averages) < 2 or len(set(averages)) > 1:
        return None
    all_wrong = "; do the training rows teach what these ask for? (agcl/tasks/README.md)"
    return (
        f"all {len(averages)} finished trials score {averages[0]:.3f} on validation rows, so the "
        f"choice says nothing{'' if averages[0] else all_wrong}"
    )


def table(trials: Sequence[Trial]) -> pa.Table:
    """One row per trial: number, state, task reached, scores, seconds, reason, and settings."""
    found = pa.Table.from_pylist(
        [
            {
                "trial": trial.number,
                "state": trial.state,
                "task": len(trial.progress),
                **(asdict(trial.last) if trial.last else {}),
                "seconds": trial.seconds,
                "reason": trial.reason,
            }
            for trial in trials
        ],
        schema=_SCHEMA,
    )
    for key in dict.fromkeys(key for trial in trials for key in trial.settings):
        found = found.append_column(key, _column([trial.settings.get(key) for trial in trials]))
    return found


def _column(values: Sequence[Any]) -> pa.Array:
    """Numbers stay numbers; values of mixed types become text."""
    kinds = {type(value) for value in values if value is not None}
    if len(kinds) > 1 and not kinds <= {int, float}:
        values = [None if value is None else str(value) for value in values]
    return pa.array(values, pa.float64() if kinds == {int, float} else None)


def why_none(tried: Sequence[Trial]) -> str:
    """Why no trial has a result: the reasons of those that failed."""
    reasons = dict.fromkeys(trial.reason for trial in tried if trial.reason)
    return f"no trial reached the last task ({'; '.join(reasons) or 'all stopped'})"


def scores_of(trial: Trial | None) -> dict[str, float]:
    """A trial's last scores by name, those that it has."""
    if not (trial and trial.last):
        return {}
    last = trial.last
    scores = {
        "average": last.average,
        "learning_accuracy": last.learned,
        "retained": last.retained,
        "base_kept": last.base_kept,
    }
    return {name: score for name, score in scores.items() if score is not None}
