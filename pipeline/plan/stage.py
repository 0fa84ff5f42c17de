"""Stages, which are the nodes of the DAG, and the artifacts they resolve to."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import agcl

from pipeline.storage import Storage, artifact
from pipeline.storage.storage import STAGES

if TYPE_CHECKING:
    from pipeline.stages.context import Context

StageFunction = Callable[[Mapping[str, Any], Mapping[str, Path], Path, "Context"], None]
"""`fn(config, inputs, out_dir, context)` reads the input folders and writes into out_dir."""


@dataclass(frozen=True)
class External:
    """An input that no stage makes: a file, or the files in a folder that match a pattern."""

    path: Path
    patterns: tuple[str, ...] = ("*",)
    identity: str | None = None
    """Used in fingerprints instead of the file hashes, such as a commit; None hashes the files."""

    @property
    def has_weights(self) -> bool:
        """Whether a model's weights are among the files, which take long to download or read."""
        return any("safetensors" in pattern for pattern in self.patterns)


@dataclass(frozen=True)
class Stage:
    """One node. Two stages with the same function, config and inputs share one artifact."""

    name: str
    """Unique within the plan, such as `train/2-rivers`."""
    fn: StageFunction
    config: Mapping[str, Any]
    """Everything that the result depends on except the inputs, as JSON."""
    inputs: Mapping[str, "Stage | External"] = field(default_factory=dict)
    session: str = ""
    """Stages with the same session name and owners run in one session."""
    train: bool = False
    """Whether the stage needs Ray Train workers; otherwise it runs in a plain Ray task."""
    reads: tuple[str, ...] | None = None
    """The only files it reads from its inputs; None means all."""


@dataclass(frozen=True)
class ResolvedStage:
    """A stage with its fingerprint and its folder in a storage. Workers receive these."""

    name: str
    fn: StageFunction
    config: Mapping[str, Any]
    inputs: Mapping[str, Path]
    folder: Path
    """The artifact's folder on this machine."""
    record: Mapping[str, Any]
    """Written to the manifest; includes the fingerprint."""
    storage: Storage
    reads: tuple[str, ...] | None = None
    given: Mapping[str, External] = field(default_factory=dict)
    """The inputs that no stage makes, by role."""

    @property
    def fingerprint(self) -> str:
        """Hash of agcl's version, the function's name, the config and the input fingerprints."""
        return str(self.record["fingerprint"])

    @property
    def place(self) -> str:
        """Path or URI of the artifact, for messages."""
        return self.storage.place(self.folder)

    def is_complete(self) -> bool:
        """Whether the artifact is complete. Raises `CorruptArtifact` if it is damaged."""
        return self.storage.is_complete(self.folder, self.fingerprint)

    def manifest(self) -> dict[str, Any] | None:
        """The manifest of the finished artifact, or None."""
        return self.storage.manifest(self.folder)

    def read(self, file: str) -> bytes | None:
        """The content of a file in the finished artifact, or None if there is no such file."""
        return self.storage.read(self.folder, file)

    def fetch(self) -> None:
        """Make the finished artifact available on this machine."""
        self.storage.fetch(self.folder)


def complete(stages: Iterable[ResolvedStage]) -> set[Path]:
    """The artifact folders of the stages that are complete."""
    folders = {stage.folder: stage for stage in stages}
    with ThreadPoolExecutor() as pool:  # Each is a request to a bucket.
        done = pool.map(ResolvedStage.is_complete, folders.values())
        return {folder for folder, is_done in zip(folders, done, strict=True) if is_done}


def _that_counts(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without settings that change no bit of the result: activation checkpointing.

    A user who runs out of memory in task 7 can turn it on and keep tasks 1 to 6. It counts with
    `compile`, because compiled code may round recomputed activations differently.
    """
    without = set() if config.get("compile") else {"activation_checkpointing"}
    return {key: value for key, value in config.items() if key not in without}


def resolve(stages: Sequence[Stage], storage: Storage) -> dict[str, ResolvedStage]:
    """Resolved stages by name, in dependency order. Equal stages share one folder.

    Hashes every external input once and runs nothing.
    """
    hashes: dict[External, str] = {}
    resolved: dict[str, ResolvedStage] = {}
    by_fingerprint: dict[str, ResolvedStage] = {}

    def input_fingerprint(source: Stage | External) -> str:
        if isinstance(source, Stage):
            return visit(source).fingerprint
        if source.identity:
            return source.identity
        if source not in hashes:
            hashes[source] = artifact.content_hash(source.path, source.patterns)
        return hashes[source]

    def visit(stage: Stage) -> ResolvedStage:
        if stage.name in resolved:
            return resolved[stage.name]
        inputs = {role: input_fingerprint(source) for role, source in stage.inputs.items()}
        identity = {
            "agcl": agcl.__version__,
            "function": stage.fn.__name__,
            "config": _that_counts(stage.config),
            "inputs": inputs,
        }
        key = artifact.fingerprint(identity)
        first = by_fingerprint.get(key)
        # Named after the function: plans that name an equal stage differently share its folder.
        kind, slash, rest = stage.name.partition("/")
        readable = f"{stage.fn.__name__}-{rest}" if slash else kind
        folder = storage.root / STAGES / f"{artifact.folder_name(readable)}-{key[:16]}"
        resolved[stage.name] = by_fingerprint[key] = first or ResolvedStage(
            name=stage.name,
            fn=stage.fn,
            config=stage.config,
            inputs={
                role: visit(source).folder if isinstance(source, Stage) else source.path
                for role, source in stage.inputs.items()
            },
            folder=folder,
            record={"stage": stage.name, "fingerprint": key, **identity},
            storage=storage,
            reads=stage.reads,
            given={r: source for r, source in stage.inputs.items() if isinstance(source, External)},
        )
        return resolved[stage.name]

    for stage in stages:
        visit(stage)
    return resolved
