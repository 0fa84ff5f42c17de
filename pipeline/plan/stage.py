"""The DAG: stages, what is done already, and running the rest in sessions.

A *session* is stages that one group of workers runs one after the other with the model kept in
memory. Every stage still writes its own artifact, so an interrupted session goes on at its first
unfinished stage.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import agcl

from pipeline.storage import artifact, mirror, object_store

if TYPE_CHECKING:
    from pipeline.stages.context import Context

StageFunction = Callable[[Mapping[str, Any], Mapping[str, Path], Path, "Context"], None]
"""`fn(config, inputs, out_dir, context)`: reads input folders, writes into out_dir."""


@dataclass(frozen=True)
class External:
    """An input that no stage made: a file, or the files of a folder that fit a pattern."""

    path: Path
    patterns: tuple[str, ...] = ("*",)


@dataclass(frozen=True)
class Stage:
    """One node. Two stages with the same function, config and inputs are one artifact."""

    name: str
    """Readable and unique in its plan, such as `train/2-rivers`."""
    fn: StageFunction
    config: Mapping[str, Any]
    """JSON: everything but the inputs that the result depends on."""
    inputs: Mapping[str, "Stage | External"] = field(default_factory=dict)
    session: str = ""
    """Stages with the same session name and owners run in one session."""
    train: bool = False
    """Needs Ray Train workers; a session of others runs in one plain Ray task."""
    reads: tuple[str, ...] | None = None
    """The only files that it reads of its inputs; None for all."""


@dataclass(frozen=True)
class Work:
    """A stage resolved to paths: what is sent to the workers."""

    name: str
    fn: StageFunction
    config: Mapping[str, Any]
    inputs: Mapping[str, Path]
    folder: Path
    record: Mapping[str, Any]
    """Goes into the manifest; holds the fingerprint."""
    store: str | None = None
    """The storage's URI where it is an object store; the folder is then a copy on this machine."""
    reads: tuple[str, ...] | None = None

    @property
    def fingerprint(self) -> str:
        """Hash of agcl's version, the function's name, the config and the inputs' fingerprints."""
        return str(self.record["fingerprint"])

    @property
    def place(self) -> str:
        """Where the artifact is kept, to be shown."""
        return object_store.place_of(self.store, self.folder) if self.store else str(self.folder)

    def is_complete(self) -> bool:
        """Whether the artifact is there and whole; raises `CorruptArtifact`."""
        if self.store:
            return mirror.is_complete(self.store, self.folder, self.fingerprint)
        return artifact.is_complete(self.folder, self.fingerprint)

    def manifest(self) -> dict[str, Any] | None:
        """The manifest of the finished artifact; None where there is none."""
        if self.store:
            return mirror.read_manifest(self.store, self.folder)
        return artifact.read_manifest(self.folder)

    def read(self, file: str) -> bytes | None:
        """What a file of the finished artifact holds; None where it has no such file."""
        if self.store:
            return mirror.read(self.store, self.folder, file)
        return (self.folder / file).read_bytes() if (self.folder / file).exists() else None

    def fetch(self) -> None:
        """Download the finished artifact, unless its folder is here."""
        if self.store:
            mirror.fetch(self.store, self.folder)


@dataclass(frozen=True)
class Session:
    """Unfinished stages that run in one place, in order."""

    name: str
    works: tuple[Work, ...]
    train: bool
    owners: tuple[str, ...]
    """The runs that need it."""
    after: frozenset[str]
    """Names of the sessions that must be done before."""


def resolve(stages: Sequence[Stage], storage: Path | str) -> dict[str, Work]:
    """Works by stage name, in dependency order; equal stages share one folder.

    `storage` is a folder or the URI of an object store. Hashes external inputs, each once. Runs
    nothing.
    """
    store = storage if isinstance(storage, str) else None
    local = object_store.cache_of(storage) if isinstance(storage, str) else storage
    hashes: dict[External, str] = {}
    works: dict[str, Work] = {}
    by_fingerprint: dict[str, Work] = {}

    def input_fingerprint(source: Stage | External) -> str:
        if isinstance(source, Stage):
            return visit(source).fingerprint
        if source not in hashes:
            hashes[source] = artifact.content_hash(source.path, source.patterns)
        return hashes[source]

    def visit(stage: Stage) -> Work:
        if stage.name in works:
            return works[stage.name]
        inputs = {role: input_fingerprint(source) for role, source in stage.inputs.items()}
        identity = {
            "agcl": agcl.__version__,
            "function": stage.fn.__name__,
            "config": stage.config,
            "inputs": inputs,
        }
        key = artifact.fingerprint(identity)
        first = by_fingerprint.get(key)
        # Named by the function, so that a stage that two plans call differently is one folder.
        kind, slash, rest = stage.name.partition("/")
        readable = f"{stage.fn.__name__}-{rest}" if slash else kind
        folder = local / "stages" / f"{artifact.folder_name(readable)}-{key[:8]}"
        works[stage.name] = by_fingerprint[key] = first or Work(
            name=stage.name,
            fn=stage.fn,
            config=stage.config,
            inputs={
                role: visit(source).folder if isinstance(source, Stage) else source.path
                for role, source in stage.inputs.items()
            },
            folder=folder,
            record={"stage": stage.name, "fingerprint": key, **identity},
            store=store,
            reads=stage.reads,
        )
        return works[stage.name]

    for stage in stages:
        visit(stage)
    return works


def sessions(plans: Mapping[str, Sequence[Stage]], storage: Path | str) -> list[Session]:
    """The sessions that complete every plan (stages by run), in an order that can be run.

    A stage is left out if its artifact is complete or nothing unfinished needs it. Sessions are
    split by the set of runs that need them, so that what runs share is computed once, before
    what they do not.
    """
    works: dict[Path, Work] = {}
    stage_of: dict[Path, Stage] = {}
    owners: dict[Path, set[str]] = {}
    for run, stages in plans.items():
        resolved = resolve(stages, storage)
        for stage in _needed(stages, resolved):
            key = resolved[stage.name].folder
            works.setdefault(key, resolved[stage.name])
            stage_of.setdefault(key, stage)
            owners.setdefault(key, set()).add(run)
    group_of = {
        key: (stage.session or stage.name, tuple(sorted(owners[key])))
        for key, stage in stage_of.items()
    }
    members: dict[tuple[str, tuple[str, ...]], list[Path]] = {}
    for key, group in group_of.items():
        members.setdefault(group, []).append(key)

    def name(group: tuple[str, tuple[str, ...]]) -> str:
        return f"{group[0]} of {', '.join(group[1])}"

    found = []
    for group, keys in members.items():
        before = {
            group_of[folder]
            for key in keys
            for folder in works[key].inputs.values()
            if folder in works
        }
        found.append(
            Session(
                name=name(group),
                works=tuple(works[key] for key in keys),
                train=any(stage_of[key].train for key in keys),
                owners=group[1],
                after=frozenset(name(g) for g in before if g != group),
            )
        )
    return found


def needed_for(goals: Sequence[Stage], stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """The stages that some of them depend on, these included, in the given order."""
    names: set[str] = set()
    todo = list(goals)
    while todo:
        stage = todo.pop()
        if stage.name not in names:
            names.add(stage.name)
            todo += [source for source in stage.inputs.values() if isinstance(source, Stage)]
    return tuple(stage for stage in stages if stage.name in names)


def _needed(stages: Sequence[Stage], works: Mapping[str, Work]) -> list[Stage]:
    """Unfinished stages that a final stage needs, in dependency order."""
    inner = {
        source.name for s in stages for source in s.inputs.values() if isinstance(source, Stage)
    }
    done: dict[str, bool] = {}

    def collect(stage: Stage) -> Iterator[Stage]:
        if stage.name in done:
            return
        done[stage.name] = works[stage.name].is_complete()
        if not done[stage.name]:
            for source in stage.inputs.values():
                if isinstance(source, Stage):
                    yield from collect(source)
            yield stage

    order = {stage.name: index for index, stage in enumerate(stages)}
    needed = [s for stage in stages if stage.name not in inner for s in collect(stage)]
    return sorted(needed, key=lambda stage: order[stage.name])
