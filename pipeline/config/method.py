"""The sections of the config that make a method: importance, protections and the baselines'."""

from typing import Annotated, Literal

from pydantic import Field

from pipeline.config.section import Place, Positive, Precision, Section, Share

METHOD_SECTIONS = ("importance", "protect", "replay", "freeze", "adapter")
"""What a method is made of; all else is the same for every method."""


class Importance(Section):
    """How the importance of weights is measured after each task."""

    estimator: Literal["lrp", "grad_x_param", "fisher", "das", "magnitude", "random"] = "lrp"
    """Relevance by LRP or by the ordinary gradient, diagonal Fisher information, standardised
    gradient, size of the weight, or (a control) random numbers."""
    source: Literal["sequential", "solo"] = "sequential"
    """Attribute the model of the sequence, or one trained from the base on the task alone."""
    rules: Literal["attnlrp", "cp"] = "attnlrp"
    """LRP rule set of the backward pass."""
    top_k: Positive | None = 4
    """Samples whose relevance counts for an entry; null takes the mean of all. For `lrp` and
    `grad_x_param`; the others have means."""
    running_values: Precision = "float32"
    """What the `top_k` values of every weight are kept in: `bfloat16` is half the memory of
    attribution, 2 in place of 4 times `top_k` bytes a weight, and rounds them once."""
    entries: bool | None = None
    """Measure the importance of every weight, not only the moments of the layers' inputs. Null does
    so if something needs it: a gate, a penalty, `permuted`, or estimator `magnitude` or `random`. A
    projection needs the moments only, which take about half the time and no `top_k` values per
    weight; the report then shows no importances."""
    permuted: bool = False
    """A control: shuffle the entries of each tensor."""
    samples: Positive | None = None
    """At most this many training rows a task, drawn by the seed; null takes all."""
    correct_only: bool = True
    """Attribute only rows that the model answers correctly. Tasks whose scorer is not exact match
    (raw or normalised) are attributed on all rows."""
    batch_size: Positive = 8
    """Rows a relevance backward pass; does not change the result."""
    split: Literal["samples", "layers"] = "samples"
    """What the workers share: rows, each with running values of all weights; or layers, each worker
    reading all rows for its own (memory: `top_k` times the weights, divided by the workers)."""
    past: tuple[Place, ...] = ()
    """Importance files of earlier runs of the same base model, protected from the first task on."""


class Protection(Section):
    """What all protections have in common."""

    ungated: Literal["train", "freeze"] = "freeze"
    """Weights without importance (embeddings, norms, head): train on, or freeze while any
    protection is active, that is from the second task on."""


class Gate(Protection):
    """Important weights move less, entry by entry."""

    kind: Literal["gate"]
    on: Literal["update", "gradient"] = "update"
    """Multiply the optimizer's whole step, or (the paper's form) only the gradient."""
    strength: float = Field(1.0, ge=0)
    """α: 0 is no gate, at 1 the most important entries do not move."""
    exponent: float = Field(1.0, gt=0)
    """γ: above 1 only the most important entries are held."""
    log_scale: float = Field(1e5, gt=0)
    """κ of the logarithmic scaling: larger values hold more entries."""


class Project(Protection):
    """Updates leave the layers' outputs for old tasks' inputs unchanged."""

    kind: Literal["project"]
    energy: Share = 0.8
    """Share of the old inputs' second moment that is protected: 0 is none."""
    weighting: Literal["relevance", "uniform", "answer"] = "relevance"
    """Weigh each token's input by the relevance that passes through it, all the same, or only those
    that predict the answer's tokens."""
    unit_inputs: bool = True
    """Scale each token's input to length 1 first; else tokens count by their squared length too."""
    directions: Literal["leading", "random"] = "leading"
    """`random` is a control: as many random directions instead."""


class Penalty(Protection):
    """Moving important weights costs: EWC's quadratic penalty, on the unscaled importance."""

    kind: Literal["penalty"]
    strength: float = Field(1e4, ge=0)
    """λ: 0 is no penalty."""


class Replay(Section):
    """Rows of earlier tasks mixed into each later one."""

    fraction: Share = 0.0
    """Share of every earlier task's training rows, drawn by the seed once a task."""


class Freeze(Section):
    """Weights that stay as they are from the second task on."""

    layers: tuple[Annotated[int, Field(ge=0)], ...] | Literal["bottom_half"] = ()
    """Indices of transformer layers, from 0 at the bottom."""
    ungated: bool = False
    """Also what is in no attributed linear layer: embeddings, norms, head."""


class Adapter(Section):
    """Train LoRA factors (PEFT) instead of the weights. Importance and protection are those of the
    factors, or with `fresh` of the inputs that earlier tasks used."""

    rank: Positive = 8
    alpha: float = Field(16.0, gt=0)
    """Scale of the product: alpha / rank."""
    fresh: bool = False
    """A new adapter every task, or one that is trained on and on."""
    orthogonal: float = Field(0.0, ge=0)
    """O-LoRA: weight of the penalty on overlap with the earlier adapters; needs `fresh`."""
    merge: bool = True
    """Write after every task a model with the factors merged in, beside the adapter; false writes
    the adapter alone, which is thousands of times smaller."""
