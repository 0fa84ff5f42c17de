"""What a prediction of memory is made for, and the parts that it is made of."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from agcl.attribution.attribute import SKETCH
from agcl.importance.moment import most_directions
from agcl.model.models import empty_model

from pipeline.config.config import Config
from pipeline.config.row_lengths import longest_of_base, longest_row
from pipeline.config.sources import decodes
from pipeline.config.weights import attributed_dtype, loaded_dtype
from pipeline.estimate.shape import Shape, shape_of

FLOAT, HALF = 4, 2
"""Bytes of a number."""
_DIRECTIONS = 0.5
"""Share of a layer's input directions that are protected, which depends on the data. An upper
guess: the most that `agcl/METHOD.md` states is 36 %, on the facts at energy 0.9."""


_NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight in four bits: a byte of scale per 64, whose scale is a float32 per 256."""


@dataclass(frozen=True)
class Part:
    """One term of a stage's peak."""

    name: str
    size: int
    """Bytes."""
    on_host: bool = False
    """Whether it lies in main memory even if the model is on a GPU."""
    once: bool = False
    """Whether all workers together have it once, and not one each."""


Parts = tuple[Part, ...]


@dataclass(frozen=True)
class RowLength:
    """The longest row: all its tokens, and those of its answer."""

    tokens: int
    answer: int


@dataclass(frozen=True)
class Setting:
    """What a prediction is made for."""

    shape: Shape
    config: Config
    row: RowLength
    directions: float = _DIRECTIONS
    of_base: RowLength | None = None
    """The longest row that the base model is measured on."""
    decodes: bool = False
    """Whether a scorer needs answers that are decoded token by token."""

    @property
    def ranks(self) -> int:
        """Workers."""
        return self.config.resources.num_workers

    @property
    def shards(self) -> int:
        """Workers that share the model."""
        return self.ranks if self.config.resources.shard_model else 1

    @property
    def on_gpu(self) -> bool:
        """Whether workers have a GPU."""
        return self.config.resources.gpus_per_worker > 0

    @property
    def weight_bytes(self) -> int:
        """Bytes of a weight in memory."""
        return HALF if loaded_dtype(self.config.model) == "bfloat16" else FLOAT

    @property
    def attributed_bytes(self) -> int:
        """Bytes of a weight in memory while it is attributed."""
        dtype = attributed_dtype(self.config.model, self.config.importance)
        return HALF if dtype == "bfloat16" else FLOAT

    @property
    def protected(self) -> tuple[tuple[int, int], ...]:
        """(out, in) of the weights that are attributed and protected: LoRA's factors, if any."""
        adapter = self.config.adapter
        if adapter is None or adapter.fresh:  # Measured on the merged model.
            return self.shape.linears
        return self.factors

    @property
    def inputs(self) -> tuple[int, ...]:
        """Widths of the inputs that these weights read, those that several read once."""
        widths = self.shape.inputs * self.shape.layers
        adapter = self.config.adapter
        if adapter is None or adapter.fresh:
            return widths
        return (*widths, *(adapter.rank for _ in self.shape.linears))  # B reads what A makes.

    @property
    def kept(self) -> int:
        """Numbers of all inputs' directions, at most."""
        keep = self.config.importance.keep
        return sum(width * kept_columns(width, keep) for width in self.inputs)

    @property
    def factors(self) -> tuple[tuple[int, int], ...]:
        """(out, in) of LoRA's factors A and B of every layer."""
        rank = self.config.adapter.rank if self.config.adapter else 0
        pairs = (((rank, width), (out, rank)) for out, width in self.shape.linears)
        return tuple(factor for pair in pairs for factor in pair)


def setting_of(config: Config) -> Setting:
    """The setting of a config with a given model, whose folder may lack the weights."""
    of_base = longest_of_base(config)
    return Setting(
        shape_of(empty_model(config.model.folder)),
        config,
        RowLength(*longest_row(config)),
        of_base=of_base and RowLength(*of_base),
        decodes=decodes(config),
    )


def total(parts: Iterable[Part], *, on_gpu: bool) -> int:
    """Bytes of a worker's memory, or of its GPU's."""
    return sum(part.size for part in parts if not (on_gpu and part.on_host))


def summed_columns(width: int) -> int:
    """Columns of what attribution sums for an input: its moment, or a sketch of a wide one."""
    return SKETCH if width > 2 * SKETCH else width


def kept_columns(width: int, keep: float) -> int:
    """The most directions that are kept of an input's moment."""
    return width if keep == 1 else min(width, most_directions(width))


def entries(linears: Iterable[tuple[int, int]]) -> int:
    """Weights of layers of (out, in)."""
    return sum(out * width for out, width in linears)


def model_parts(setting: Setting, *, gathered: bool, size: int = 0) -> list[Part]:
    """The model: a shard of it and, of a sharded one, what a worker gathers while it computes.

    `size` is that of a weight, if not the config's.
    """
    shape, size = setting.shape, size or setting.weight_bytes
    parts = [Part("weights", size * shape.weights // setting.shards)]
    if setting.config.model.quantization:
        others = shape.weights - shape.linear_weights
        parts = [Part("weights", int(_NF4 * shape.linear_weights) + size * others)]
        widest = max(out * width for out, width in shape.linears)
        parts.append(Part("a weight that computes", size * widest))
    if setting.config.adapter:
        parts.append(Part("adapter", FLOAT * entries(setting.factors)))
    if setting.shards > 1:
        # This layer and the next, and embeddings and head; with gradients as large.
        largest = 2 * shape.layer_weights + shape.embeddings
        parts.append(Part("gathered layers", (1 + gathered) * size * largest))
    return parts


def loading(setting: Setting, size: int = 0) -> Parts:
    """Every worker reads the whole model into main memory, and moves it, or its share, from there.

    `size` is that of a weight, if not the config's.
    """
    parts = model_parts(setting, gathered=False, size=size)
    whole = parts[0].size * setting.shards * (setting.on_gpu or setting.shards > 1)
    return (*parts, Part("the whole model while it loads", whole, on_host=True))


def repeated(setting: Setting, tokens: int) -> int:
    """Bytes of a layer's keys and values, repeated in float32 on a GPU for grouped heads.

    Torch's kernels that hold no attention weights take grouped heads in half precision only.
    """
    shape = setting.shape
    needed = setting.on_gpu and not shape.eager_heads
    return FLOAT * tokens * 2 * (shape.query - shape.key) * needed


def cast_weights(setting: Setting) -> int:
    """Weights that autocast copies: of linear layers, but those in four bits, and of the head."""
    shape = setting.shape
    own = 0 if setting.config.model.quantization else shape.linear_weights
    return own + shape.vocabulary * shape.width


def largest(setting: Setting, phases: Sequence[Parts]) -> Parts:
    """The phase with the largest total of a worker, without parts of zero bytes."""
    worst = max(phases, key=lambda parts: total(parts, on_gpu=setting.on_gpu))
    return tuple(part for part in worst if part.size)


def of_all_workers(setting: Setting, parts: Parts) -> Parts:
    """What all workers of one machine need in its main memory: on a CPU that is everything."""
    return tuple(
        replace(part, size=part.size * (1 if part.once else setting.ranks), on_host=True)
        for part in parts
        if part.size and (part.on_host or not setting.on_gpu)
    )


def logits_size(shape: Shape, answers: int, copies: int) -> int:
    """Bytes of logits of answer tokens, with `copies` copies alive in float32."""
    return FLOAT * answers * shape.vocabulary * (copies + shape.capped_logits)
