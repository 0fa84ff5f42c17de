"""The config sections that define a method: importance, protections, and the baselines'."""

from typing import Annotated, Any, Literal, cast

from pydantic import Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from pipeline.config.section import Place, Positive, Precision, Section, Seed, Share
from pipeline.config.tasks import TaskFormat

METHOD_SECTIONS = (
    *("importance", "protect", "base", "replay", "freeze", "loss", "merge", "adapter"),
    "subspace",
)
"""The sections that define a method. Everything else is the same for every method."""


ROOT_OF_TASKS = "1/sqrt(t)"
OF_MOMENTS = ("weighting", "unit_inputs")
"""Keys of a projection that say how moments are measured."""


class Importance(Section):
    """How importance is measured after each task."""

    estimator: Literal["lrp", "grad_x_param", "fisher", "das", "magnitude", "random"] = "lrp"
    """Relevance by LRP or by the ordinary gradient, diagonal Fisher information, standardized
    gradient, absolute weight, or random numbers (a control)."""
    source: Literal["sequential", "solo"] = "sequential"
    """Attribute the model of the sequence, or a model trained from the base on the task alone."""
    rules: Literal["attnlrp", "cp"] = "attnlrp"
    """LRP rules for the backward pass."""
    top_k: Positive | None = 4
    """Number of samples with the largest relevance to average for each weight; null averages all.
    For `lrp` and `grad_x_param`; the other estimators average all."""
    running_values: Precision = "float32"
    """Type of the running `top_k` values. `bfloat16` halves the memory of attribution, from 4 to 2
    times `top_k` bytes per weight, and rounds each value once."""
    precision: Precision = "float32"
    """`bfloat16` attributes under autocast and with TF32 on a GPU; sums stay float32. Weights that
    are bfloat16 (`model.dtype`) are then attributed as they are, without a copy in float32."""
    keep: float = Field(0.95, gt=0, le=1)
    """Share of an input's second moment that is stored, as its leading directions: at most a
    quarter of the input's width, or 256 if that is more. A projection cannot protect more. 1 stores
    all of it."""
    entries: bool | None = None
    """Measure the importance of every weight, not only the moments of the layers' inputs. Null does
    so if something needs it: a gate, a penalty, `permuted`, or estimator `magnitude` or `random`. A
    projection needs the moments only, which take about half the time and no `top_k` values per
    weight; the report then shows no importances."""
    permuted: bool = False
    """A control: shuffle the importance within each weight tensor."""
    samples: Positive | None = None
    """Maximum training rows per task, sampled by the seed; null takes all."""
    correct_only: bool = True
    """Attribute only rows that the model answers correctly. Tasks whose scorer gives
    partial credit (all but `exact_match`, `normalised_exact_match`, `olora_match`) are attributed
    on all rows, and with a warning so is a task of which the model answers no row correctly."""
    batch_size: Positive = 8
    """Rows per backward pass. Changes results by rounding only."""
    split: Literal["samples", "layers"] = "samples"
    """What is split between workers. `samples`: each worker attributes its share of the rows, to
    all weights. `layers`: each worker attributes all rows, to its share of the layers, which
    divides the memory for the `top_k` values by the number of workers."""
    past: tuple[Place, ...] = ()
    """Importance files of earlier runs of the same base model, protected from the first task on."""


class ProtectSection(Section):
    """Settings of all protections."""

    ungated: Literal["train", "freeze"] = "freeze"
    """Weights without importance (embeddings, norms, head): train them, or freeze them while a
    protection is active: from the second task on, or from the first one if something is protected
    then."""

    @property
    def needs_importance(self) -> bool:
        """Whether it protects what is measured on data: earlier tasks, and the base model."""
        return True


class Gate(ProtectSection):
    """Scale each weight's update down by its importance."""

    kind: Literal["gate"]
    on: Literal["update", "gradient"] = "update"
    """Scale the optimizer's whole step, or only the gradient (as in the paper)."""
    strength: float = Field(1.0, ge=0)
    """α: 0 means no gate; at 1 the most important weights do not move."""
    exponent: float = Field(1.0, gt=0)
    """γ: above 1 only the most important weights are held."""
    log_scale: float = Field(1e5, gt=0)
    """κ of the logarithmic scaling: larger values hold more weights."""


class Project(ProtectSection):
    """Project updates so that the layers' outputs for the inputs of earlier tasks do not change."""

    kind: Literal["project"]
    energy: Share = 0.8
    """Share of the earlier inputs' second moment to protect, at most `importance.keep`; of
    `directions: weights`, of the squared singular values. 0 means no projection."""
    weighting: Literal["relevance", "uniform", "answer"] = "relevance"
    """Weight of each token's input: its relevance, the same for all, or the same for tokens that
    predict an answer token and 0 for others."""
    unit_inputs: bool = True
    """Normalize each token's input to length 1; otherwise its squared length is a weight too."""
    directions: Literal["leading", "random", "weights"] = "leading"
    """Two controls: `random` takes the same number of random directions; `weights` the leading
    right singular vectors of each weight before the task, from the first task on and without any
    data: nothing is measured, and `weighting`, `unit_inputs` and the section `base` do not matter.
    """

    @property
    def needs_importance(self) -> bool:
        """Not if its directions are those of the weights."""
        return self.directions != "weights"


class Penalty(ProtectSection):
    """EWC's quadratic penalty on the change of important weights, from the unscaled importance.
    With `adapter.fresh`, of the weights below the adapter: on the product of its factors."""

    kind: Literal["penalty"]
    strength: float = Field(1e4, ge=0)
    """λ: 0 means no penalty."""


class Base(Section):
    """Protect what the base model knew, as if it were a task before the first one. The items of
    `protect` do this, or `adapter.init: corda`; a method with neither ignores this section. With an
    adapter, only a projection can do it or, with `adapter.fresh`, a penalty. Measured on the base
    model, once for all trials, for methods that measure alike, and for seeds of a given model."""

    protect: Literal["none", "self", "text", "rows"] = "none"
    """On what the base model's importance is measured. `self`: on text that it writes itself, which
    needs no data: half of the samples from its beginning-of-text token, half (none if there is no
    chat template) as answers to a user's words that it makes up too. `text`: on a text of yours.
    `rows`: on rows of yours."""
    energy: Share = 0.7
    """Share of the base model's second moment that a projection protects, at most
    `importance.keep`; tasks have their own. 0.9 keeps more of the base, leaves less room to learn
    and takes about four times the directions of 0.7 (METHOD.md, section 5)."""
    weighting: Literal["uniform", "relevance", "answer"] = "uniform"
    """Weight of each token's input, as in a projection. `uniform` needs forward passes only."""
    samples: Positive = 96
    """Texts (fewer if a given text is short), or maximum number of rows."""
    tokens: Positive = 64
    """Length of each text, less if the model has fewer positions; not for `rows`."""
    seed: Seed = 0
    """Seed of what is drawn. Independent of the run's `seed`."""
    text: Place | None = None
    """Text file (UTF-8), or folder of text files, for `text`."""
    rows: Annotated[TaskFormat, Field(discriminator="format")] | None = None
    """What the base model can do, in the form of `tasks`, for `rows`: their training rows count.
    The built-in model needs none: it has its generic facts."""


class Replay(Section):
    """Mix rows of earlier tasks into each later task."""

    fraction: Share = 0.0
    """Share of each earlier task's training rows, sampled once per task by the seed."""


class Freeze(Section):
    """Freeze weights from the second task on."""

    layers: tuple[Annotated[int, Field(ge=0)], ...] | Literal["bottom_half"] = ()
    """Indices of transformer layers, from 0 at the bottom."""
    ungated: bool = False
    """Also freeze weights outside the attributed linear layers: embeddings, norms, head."""


class Loss(Section):
    """A frozen reference model beside the one that is trained, and what it adds to the loss. For
    baselines; protections can be combined with it."""

    reference: Literal["none", "base", "previous"] = "none"
    """The base model, or the model before the task (for the first task that is the base model).
    Held in bfloat16 on a GPU, on a CPU in the model's dtype, unless it is the trained model
    without its adapter."""
    strength: float = Field(0.1, ge=0)
    """Weight of the KL divergence between model and reference on the answer tokens."""
    form: Literal["forward", "reverse"] = "forward"
    """`forward`: KL(reference || model) over the whole vocabulary. `reverse`: an estimate of
    KL(model || reference) from the answer's tokens alone. Their strengths are not comparable."""
    weighting: Literal["uniform", "probability"] = "uniform"
    """Weight of each answer token's cross-entropy; `probability` takes the model's own probability
    of it (DFT)."""
    max_perplexity: float | None = Field(None, gt=1)
    """Drop the cross-entropy of answer tokens whose perplexity under the reference, 1 / q(token),
    is above this (STM). The loss is still divided by the number of all answer tokens."""

    @property
    def needs_reference(self) -> bool:
        """Whether a reference has any effect on training."""
        return self.reference != "none" and (self.strength > 0 or self.max_perplexity is not None)

    @property
    def is_cross_entropy(self) -> bool:
        """Whether this is the ordinary loss."""
        return not self.needs_reference and self.weighting == "uniform"

    @model_validator(mode="after")
    def _consistent(self) -> "Loss":
        if self.max_perplexity is not None and self.reference == "none":
            raise ValueError("max_perplexity: needs a reference model; set loss.reference")
        return self


def _factor(value: Any) -> float | str:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value == ROOT_OF_TASKS or (number and 0 < value <= 1):
        return cast(float | str, value)
    raise PydanticCustomError("factor", f"must be above 0 and at most 1, or {ROOT_OF_TASKS}")


class Merge(Section):
    """Keep only part of a task's change: start + factor · (trained - start). Costs no training."""

    onto: Literal["previous", "base"] = "previous"
    """What the start is. `previous`: the weights before the task; the next task trains from the
    result. `base`: the base model's weights (WiSE-FT). Training then continues from the unmerged
    weights; each task's result is only scored, and the last one is the final model."""
    factor: Annotated[float | str, PlainValidator(_factor)]
    """Share of the change to keep; 1 keeps all of it. `1/sqrt(t)` shrinks with the number t of the
    task."""


class Adapter(Section):
    """Train LoRA factors (PEFT) instead of the weights. Importance and protections apply to the
    factors; with `fresh` to the weights below them and the inputs that earlier tasks used."""

    rank: Positive = 8
    alpha: float = Field(16.0, gt=0)
    """The product of the factors is scaled by alpha / rank."""
    fresh: bool = False
    """Start a new adapter for every task; false keeps training one adapter."""
    orthogonal: float = Field(0.0, ge=0)
    """O-LoRA: weight of the penalty on overlap with earlier adapters; needs `fresh`."""
    merge: bool = True
    """After every task, write a model with the factors merged in as well as the adapter; false
    writes only the adapter, which is thousands of times smaller."""
    init: Literal["random", "corda"] = "random"
    """What the factors start from. `corda`: the directions of each weight that the text of the
    section `base` uses least, taken out of the weight (CorDA, knowledge-preserved)."""

    @model_validator(mode="after")
    def _consistent(self) -> "Adapter":
        if self.init == "corda" and self.fresh:
            raise ValueError(
                "init: corda cannot be combined with adapter.fresh; it starts one adapter for all "
                "tasks"
            )
        if self.orthogonal and not self.fresh:
            raise ValueError("orthogonal: needs adapter.fresh")
        if self.fresh and not self.merge:
            raise ValueError(
                "merge: must be true with adapter.fresh, whose later adapters build on the merged "
                "weights"
            )
        return self


class Subspace(Section):
    """OSFT (PEFT's OSF): freeze the leading singular directions of each weight, more with every
    task, and train the others. It needs no importance and no data of earlier tasks."""

    unfreeze: float = Field(0.25, gt=0, lt=1)
    """Share of each weight's singular directions that the last task trains. Task t of T freezes the
    leading (1 - unfreeze) · t / T of them."""

    def preserved(self, task: int, tasks: int) -> float:
        """The share of singular directions that task number `task`, from 1, of `tasks` keeps."""
        return (1 - self.unfreeze) * task / tasks
