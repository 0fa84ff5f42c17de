"""Groups the unfinished stages into sessions.

A *session* is a list of stages that one group of workers runs in order, with the model kept in
memory. Every stage still writes its own artifact, so an interrupted session resumes at its first
unfinished stage.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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

    Skips complete stages and stages that only complete stages need. Stages needed by different
    sets of runs are put in different sessions, so that a shared stage is computed once.
    """
    found: dict[Path, tuple[Stage, ResolvedStage]] = {}
    owners: dict[Path, set[str]] = {}
    looked: dict[Path, bool] = {}

    def is_complete(resolved: Mapping[str, ResolvedStage], name: str) -> bool:
        # Once for all runs: a stage that another command finishes meanwhile would be missing for
        # some of them only, and their sessions would wait for each other.
        folder = resolved[name].folder
        if folder not in looked:
            looked[folder] = resolved[name].is_complete()
        return looked[folder]

    for run, stages in plans.items():
        resolved = resolve(stages, storage)
        inner = {source.name for stage in stages for source in _sources(stage)}
        final = [stage for stage in stages if stage.name not in inner]
        for stage in needed_for(final, stages, partial(is_complete, resolved)):
            folder = resolved[stage.name].folder
            found.setdefault(folder, (stage, resolved[stage.name]))
            owners.setdefault(folder, set()).add(run)
    name_of = {
        folder: f"{stage.session or stage.name} of {', '.join(sorted(owners[folder]))}"
        for folder, (stage, _) in found.items()
    }
    members: dict[str, list[Path]] = {}
    for folder, name in name_of.items():
        members.setdefault(name, []).append(folder)
    return [
        Session(
            name=name,
            stages=tuple(found[folder][1] for folder in folders),
            train=any(found[folder][0].train for folder in folders),
            owners=tuple(sorted(owners[folders[0]])),
            after=frozenset(
                name_of[source]
                for folder in folders
                for source in found[folder][1].inputs.values()
                if name_of.get(source, name) != name
            ),
        )
        for name, folders in members.items()
    ]


def needed_for(
    goals: Sequence[Stage],
    stages: Sequence[Stage],
    is_complete: Callable[[str], bool] = lambda name: False,
) -> tuple[Stage, ...]:
    """The goals and the stages they depend on, in the order of `stages`.

    Skips complete stages, by name, and stages that only complete stages need.
    """
    names = {goal.name for goal in goals}
    needed = []
    for stage in reversed(stages):  # A stage's inputs come before it.
        if stage.name in names and not is_complete(stage.name):
            needed.append(stage)
            names |= {source.name for source in _sources(stage)}
    return tuple(reversed(needed))


def _sources(stage: Stage) -> list[Stage]:
    return [source for source in stage.inputs.values() if isinstance(source, Stage)]
