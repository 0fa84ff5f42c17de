"""What the sections of all task formats share, and what they say a task is made from."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.config.section import Positive, Section, Seed

if TYPE_CHECKING:
    from pipeline.config.config import Config

Settings = Mapping[str, Any]
Paths = Mapping[str, Path]


@dataclass(frozen=True)
class Source:
    """What a task is made from."""

    name: str
    settings: Settings
    """JSON that `OPEN` takes; `sources.sources` adds the `format`."""
    files: Paths = field(default_factory=dict)
    """By role. Fingerprints cover their contents, not their paths."""


class TaskSection(Section):
    """Settings of all task formats."""

    max_length: Positive = 512
    """Maximum tokens per row, prompt and answer; a model with fewer positions lowers it."""
    truncate: Literal["drop", "left"] = "drop"
    """`drop` rows that are longer, or cut the beginning of their prompts (`left`) but keep BOS and
    an instruction of `super_ni`. The prompt of a conversation is all before its last assistant
    turn. Such rows are counted and shown; a row whose answer alone is too long is dropped."""
    train_rows: Positive | None = None
    """Maximum training rows per task, sampled by `seed`; null takes all."""
    test_rows: Positive | None = None
    """Maximum test rows per task, and maximum validation rows where a task has them."""
    seed: Seed = 0
    """Seed for sampling rows and for the built-in facts. Independent of the run's `seed`."""
    chat_template: bool = False
    """Render each prompt as a user's message and each answer as the assistant's, by the tokenizer's
    chat template. Conversations always are."""

    @abstractmethod
    def sources(self, config: "Config") -> Iterator[Source]:
        """The tasks in training order. Raises `InputError` for a missing file or folder."""
