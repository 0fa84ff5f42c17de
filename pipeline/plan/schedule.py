"""Groups the unfinished stages into sessions.

A *session* is a list of stages that one group of workers runs in order, with the model kept in
memory. Every stage still writes its own artifact, so an interrupted session resumes at its first
unfinished stage.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.plan.stage import ResolvedStage, Stage, resolve
from pipeline.storage import Storage


@dataclass(frozen=True)
class Session:
    """Unfinished stages that one group of workers runs in order."""

    name: str
    stages: tuple[ResolvedStage, ...]
    train: bool
    """Whether it needs Ray Train workers."""
    owners: tuple[str, ...]
    """The runs that need it."""
    after: frozenset[str]
    """Names of the sessions that must finish first."""


def sessions(plans: Mapping[str, Sequence[Stage]], storage: Storage) -> list[Session]:
    """The sessions that complete every plan (stages by run), in dependency order.

    Complete stages, and stages that only complete stages need, are skipped. Sessions are split by
    the set of runs that need them, so shared stages are computed once, before all others.
    """
    stage_of: dict[Path, tuple[Stage, ResolvedStage]] = {}
    owners: dict[Path, set[str]] = {}
    for run, stages in plans.items():
        resolved = resolve(stages, storage)
        for stage in _missing(stages, resolved):
            folder = resolved[stage.name].folder
            stage_of.setdefault(folder, (stage, resolved[stage.name]))
            owners.setdefault(folder, set()).add(run)
    key_of = {
        folder: (stage.session or stage.name, tuple(sorted(owners[folder])))
        for folder, (stage, _) in stage_of.items()
    }
    members: dict[tuple[str, tuple[str, ...]], list[Path]] = {}
    for folder, key in key_of.items():
        members.setdefault(key, []).append(folder)

    def name(key: tuple[str, tuple[str, ...]]) -> str:
        return f"{key[0]} of {', '.join(key[1])}"

    return [
        Session(
            name=name(key),
            stages=tuple(stage_of[folder][1] for folder in folders),
            train=any(stage_of[folder][0].train for folder in folders),
            owners=key[1],
            after=frozenset(
                name(key_of[source])
                for folder in folders
                for source in stage_of[folder][1].inputs.values()
                if source in key_of and key_of[source] != key
            ),
        )
        for key, folders in members.items()
    ]


def needed_for(goals: Sequence[Stage], stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """The goals and the stages they depend on, in the order of `stages`."""
    names: set[str] = set()
    todo = list(goals)
    while todo:
        stage = todo.pop()
        if stage.name not in names:
            names.add(stage.name)
            todo += [source for source in stage.inputs.values() if isinstance(source, Stage)]
    return tuple(stage for stage in stages if stage.name in names)


def _missing(stages: Sequence[Stage], resolved: Mapping[str, ResolvedStage]) -> list[Stage]:
    """Unfinished stages that the final stages need, in dependency order."""
    inner = {
        source.name for s in stages for source in s.inputs.values() if isinstance(source, Stage)
    }
    done: dict[str, bool] = {}

    def collect(stage: Stage) -> Iterator[Stage]:
        if stage.name in done:
            return
        done[stage.name] = resolved[stage.name].is_complete()
        if not done[stage.name]:
            for source in stage.inputs.values():
                if isinstance(source, Stage):
                    yield from collect(source)
            yield stage

    order = {stage.name: index for index, stage in enumerate(stages)}
    needed = [s for stage in stages if stage.name not in inner for s in collect(stage)]
    return sorted(needed, key=lambda stage: order[stage.name])
