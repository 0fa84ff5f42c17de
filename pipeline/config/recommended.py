"""The learning rates and epochs that others use, by a model's size and by full or LoRA training."""

from dataclasses import dataclass

from agcl.model.models import config_of

from pipeline.config.config import Config

_LARGE = 1_000_000_000


@dataclass(frozen=True)
class Usual:
    """What others use, and a value to start with."""

    rates: tuple[float, float]
    rate: float
    epochs: tuple[int, int]
    by: str
    """Whose settings these are."""


_FULL_LARGE = Usual((5e-6, 2e-5), 1e-5, (1, 3), "mini_trainer, TRL's default")
_FULL_SMALL = Usual((2e-5, 1e-3), 1e-4, (1, 10), "alignment-handbook's SmolLM2, agcl/RESULTS.md")
_LORA_LARGE = Usual((1e-4, 5e-4), 2e-4, (1, 3), "TRL's guides, Schulman 2025")
_LORA_SMALL = Usual((1e-4, 2e-3), 1e-3, (1, 10), "agcl/RESULTS.md")


def usual(num_weights: int, *, lora: bool) -> Usual:
    """What others use for a model of this size."""
    if lora:
        return _LORA_LARGE if num_weights >= _LARGE else _LORA_SMALL
    return _FULL_LARGE if num_weights >= _LARGE else _FULL_SMALL


def unusual(config: Config, num_weights: int) -> list[str]:
    """One line per setting that is far from what others use; the built-in model has none."""
    if config.model.is_builtin:
        return []
    lora = config.adapter is not None
    others = usual(num_weights, lora=lora)
    rate, epochs = config.training.learning_rate, config.training.epochs
    what = f"{'LoRA' if lora else 'full fine-tuning'} of {count_text(num_weights)} weights"
    found = []
    (low, high), (_, most) = others.rates, others.epochs
    if not low / 2 <= rate <= 2 * high:
        than = "above" if rate > high else "below"
        found.append(
            f"training.learning_rate: {rate_text(rate)} is {than} what others use for {what}, "
            f"{rate_text(low)} to {rate_text(high)} ({others.by})"
        )
    if epochs > most:
        found.append(
            f"training.epochs: {epochs} is more than others use for {what}, at most {most} "
            f"({others.by})"
        )
    return found


def too_long_for_batches(config: Config) -> list[str]:
    """A line if rows may be so long that a model encodes positions differently, for their batch."""
    model = config_of(config.model.folder)
    rope = getattr(model, "rope_parameters", None) or {}
    most = getattr(model, "original_max_position_embeddings", None)
    most = rope.get("original_max_position_embeddings", most)
    if rope.get("rope_type") != "longrope" or not most or config.tasks.max_length <= most:
        return []
    return [
        f"tasks.max_length: {config.tasks.max_length} is more than {most}, above which this model "
        "encodes positions differently for a whole batch: results then depend on the batch size"
    ]


def rate_text(rate: float) -> str:
    """A learning rate as in a config: 2e-5, not 2e-05 or 0.00002."""
    mantissa, _, exponent = f"{rate:e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def count_text(number: int) -> str:
    """A number of weights: 134 million, 1.24 billion."""
    for size, name in ((1_000_000_000, "billion"), (1_000_000, "million")):
        if number >= size:
            return f"{number / size:.3g} {name}"
    return f"{number:,}"
