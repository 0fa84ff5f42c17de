"""The named methods: the settings of each, and the setting that tuning varies."""

from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from pipeline.secrets import masked

BOUNDS = ("joint", "solo")
"""Methods that do not train on a sequence: upper bounds for what can be kept and learned."""


@dataclass(frozen=True)
class Knob:
    """A setting that is tuned in addition to the learning rate, and its bounds."""

    key: str
    low: float
    high: float
    logarithmic: bool = True


@dataclass(frozen=True)
class Method:
    """A preset of the config's method sections. Sections in the user's file replace it."""

    description: str
    sections: dict[str, Any] = field(default_factory=dict)
    knob: Knob | None = None
    controls: tuple[str, ...] = ()
    """Methods that lack only the claimed improvement; reports compare with them too."""
    variant_of: str | None = None
    """The method that this one equals except for `changes`. It uses the file's settings for that
    method, so that a control differs in nothing else."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Settings of a variant: keys of `importance` or `base.<key>`, or of the projection in
    `protect`."""


_LOG_SCALE = Knob("protect.0.log_scale", 1e1, 1e7)
_STRENGTH = Knob("protect.0.strength", 1e1, 1e7)
_ENERGY = Knob("protect.0.energy", 0.5, 0.95, logarithmic=False)
_ANCHOR = Knob("loss.strength", 1e-2, 1e2)


def _gate(description: str, *, controls: tuple[str, ...], **importance: Any) -> Method:
    sections = {"importance": importance, "protect": [{"kind": "gate"}]}
    return Method(description, sections, _LOG_SCALE, controls)


def _variant(description: str, of: str, knob: Knob, **changes: Any) -> Method:
    return Method(description, knob=knob, variant_of=of, changes=changes)


METHODS: dict[str, Method] = {
    "sequential": Method("plain fine-tuning, one task after the other"),
    "agcl": Method(
        "projection away from the inputs that carried the base model's and earlier tasks' answers",
        {"protect": [{"kind": "project"}], "base": {"protect": "self"}},
        _ENERGY,
        controls=(
            *("base_unprotected", "project_uniform", "project_answer", "project_random"),
            *("project_raw", "project_weights"),
        ),
    ),
    "gate": _gate(
        "the paper's gate: weights with relevance move less",
        controls=("gate_permuted", "gate_random"),
    ),
    "ewc": Method(
        "elastic weight consolidation: Fisher information as a penalty",
        {
            "importance": {"estimator": "fisher"},
            "protect": [{"kind": "penalty", "ungated": "train"}],
        },
        _STRENGTH,
    ),
    "replay": Method("a tenth of each earlier task's rows mixed in", {"replay": {"fraction": 0.1}}),
    "freeze": Method("the bottom half of the layers frozen", {"freeze": {"layers": "bottom_half"}}),
    "das": Method(
        "gate by the standardized gradient, after DAS",
        {
            "importance": {"estimator": "das"},
            # With a small log_scale the logarithmic scaling is linear.
            "protect": [{"kind": "gate", "log_scale": 1e-3}],
        },
        Knob("protect.0.strength", 0.25, 1.0, logarithmic=False),
    ),
    "kl": Method(
        "KL divergence from the base model on the answers, over the whole vocabulary",
        {"loss": {"reference": "base"}},
        _ANCHOR,
    ),
    "kl_reverse": Method(
        "the reverse KL divergence from the base model, estimated from the answers' tokens",
        {"loss": {"reference": "base", "form": "reverse"}},
        _ANCHOR,
    ),
    "asft": Method(
        "kl, and each token's loss weighted by its own probability (ASFT)",
        {"loss": {"reference": "base", "weighting": "probability"}},
        _ANCHOR,
    ),
    "lwf": Method(
        "KL divergence from the previous task's model on the new answers (LwF)",
        {"loss": {"reference": "previous"}},
        _ANCHOR,
    ),
    "stm": Method(
        "no loss on tokens that surprise the base model (STM)",
        {"loss": {"reference": "base", "strength": 0.0, "max_perplexity": 2.5}},
        Knob("loss.max_perplexity", 1.5, 1e3),
    ),
    "merge": Method(
        "keeps a fixed part of each task's change",
        {"merge": {"factor": 0.5}},
        Knob("merge.factor", 0.1, 0.9, logarithmic=False),
    ),
    "merge_sqrt": Method(
        "keeps 1/sqrt(t) of task t's change, as SLAO scales it",
        {"merge": {"factor": "1/sqrt(t)"}},
    ),
    "wise": Method(
        "weights between the base model's and the trained ones (WiSE-FT)",
        {"merge": {"onto": "base", "factor": 0.5}},
        Knob("merge.factor", 0.1, 0.9, logarithmic=False),
    ),
    "lora": Method("one LoRA adapter for all tasks", {"adapter": {}}),
    "olora": Method(
        "one LoRA adapter per task, kept orthogonal to the earlier ones (O-LoRA)",
        {"adapter": {"fresh": True, "orthogonal": 0.5}},
        Knob("adapter.orthogonal", 0.05, 5.0),
    ),
    "lora_agcl": Method(
        "one LoRA adapter for all tasks, projected like agcl",
        {"adapter": {}, "protect": [{"kind": "project"}]},
        _ENERGY,
        controls=("lora",),
    ),
    "inflora": Method(
        "one LoRA adapter per task, orthogonal to the inputs of earlier tasks (after InfLoRA)",
        {
            "adapter": {"fresh": True},
            "protect": [{"kind": "project", "weighting": "uniform", "unit_inputs": False}],
        },
        _ENERGY,
        controls=("lora", "olora"),
    ),
    "ewc_lora": Method(
        "one LoRA adapter per task, its update penalized by Fisher information (EWC-LoRA)",
        {
            "adapter": {"fresh": True},
            "importance": {"estimator": "fisher"},
            "protect": [{"kind": "penalty"}],
        },
        _STRENGTH,
        controls=("lora", "olora"),
    ),
    "corda": Method(
        "one LoRA adapter for all tasks, in directions that general text uses least (CorDA)",
        {"adapter": {"init": "corda"}, "base": {"protect": "self"}},
        controls=("lora",),
    ),
    "osf": Method(
        "leading singular directions of each weight frozen, more with every task (OSFT)",
        {"subspace": {}},
        Knob("subspace.unfreeze", 0.05, 0.8),
    ),
    "joint": Method("upper bound of retention: all tasks trained together"),
    "solo": Method("upper bound of learning: every task trained alone from the base model"),
    "gate_fisher": _gate(
        "gate by Fisher information", controls=("gate_random",), estimator="fisher"
    ),
    "gate_grad_x_param": _gate(
        "gate by weight times gradient", controls=("gate_random",), estimator="grad_x_param"
    ),
    "gate_magnitude": _gate(
        "gate by the absolute weight", controls=("gate_random",), estimator="magnitude"
    ),
    "gate_random": _variant(
        "control: gate by random numbers", "gate", _LOG_SCALE, estimator="random"
    ),
    "gate_permuted": _variant(
        "control: gate by shuffled relevance", "gate", _LOG_SCALE, permuted=True
    ),
    "ewc_base": _variant(
        "ewc from the base model on, by Fisher information on its own text",
        "ewc",
        _STRENGTH,
        **{"base.protect": "self"},
    ),
    "base_unprotected": _variant(
        "control: earlier tasks are protected, the base model is not",
        "agcl",
        _ENERGY,
        **{"base.protect": "none"},
    ),
    "project_uniform": _variant(
        "control: all tokens have the same weight", "agcl", _ENERGY, weighting="uniform"
    ),
    "project_answer": _variant(
        "control: only the tokens that predict the answer", "agcl", _ENERGY, weighting="answer"
    ),
    "project_raw": _variant(
        "control: inputs are not normalized, so long ones count more",
        "agcl",
        _ENERGY,
        unit_inputs=False,
    ),
    "project_random": _variant(
        "control: the same number of random directions", "agcl", _ENERGY, directions="random"
    ),
    "project_weights": _variant(
        "control: the weights' leading right singular vectors, without any data",
        "agcl",
        _ENERGY,
        directions="weights",
        **{"base.protect": "none"},
    ),
    "frozen_embeddings": Method(
        "control: only embeddings, norms and head frozen", {"freeze": {"ungated": True}}
    ),
}


def no_method(name: object) -> str:
    """What to say of a name that no method has."""
    close = get_close_matches(str(name), METHODS, n=1)
    meant = f"did you mean {close[0]!r}? " if close else ""
    return f"no method {masked(repr(name))[:100]} ({meant}there are {', '.join(METHODS)})"
