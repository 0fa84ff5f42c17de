"""Losses over a batch's answer tokens: cross-entropy, and what anchors it to a frozen reference.

The anchored losses are baselines. All add up over answer tokens, so that training can divide by the
number of tokens of the global batch: results do not depend on micro-batches or ranks.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from transformers import PreTrainedModel

from agcl.model import adapter
from agcl.model.forward import answer_logits
from agcl.tasks.batches import Batch, answer_tokens

Loss = Callable[[PreTrainedModel, Batch], Tensor]
"""The loss of a batch, summed over its answer tokens, with its graph."""
Reference = Callable[[PreTrainedModel, Batch], Tensor]
"""A frozen model's logits at the answer tokens, (answer tokens, vocabulary)."""
Form = Literal["forward", "reverse"]
Weighting = Literal["uniform", "probability"]


def summed_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Sum of the cross-entropy over the batch's answer tokens, in float32."""
    return cross_entropy(answer_logits(model, batch).float(), answer_tokens(batch), reduction="sum")


def frozen(reference: PreTrainedModel) -> Reference:
    """The logits of another model, whatever model is trained."""
    reference.requires_grad_(False).eval()
    return lambda _, batch: answer_logits(reference, batch)


def without_adapter(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The logits of the trained model itself with its adapter disabled: no second copy of it."""
    training = model.training
    with adapter.disabled(model.eval()):
        logits = answer_logits(model, batch)
    model.train(training)
    return logits


def anchored_loss(
    reference: Reference | None,
    *,
    strength: float,
    form: Form = "forward",
    weighting: Weighting = "uniform",
    max_perplexity: float | None = None,
) -> Loss:
    """Cross-entropy plus `strength` times a KL divergence from the reference, per answer token.

    With p the model's and q the reference's distribution of the next token, y the token itself:

    - `forward`: KL(q || p) over the whole vocabulary. With the base model as reference this is the
      anchor of ASFT (Zhu et al. 2025, arXiv 2509.23753) as LLaMA-Factory has it; with the previous
      task's model it is LwF (Li and Hoiem 2016, arXiv 1606.09282) at temperature 1.
    - `reverse`: Schulman's estimator q/p - log(q/p) - 1 of KL(p || q) at y alone, as NeMo-RL has
      it. Strengths do not carry over from one form to the other.

    `probability` weights each token's cross-entropy by its own p(y), without a gradient (DFT, Wu et
    al. 2025, arXiv 2508.05629, the other half of ASFT). `max_perplexity` drops the cross-entropy of
    tokens with 1/q(y) above it (STM, Wu et al. 2025, arXiv 2501.14315); the loss is still divided
    by all tokens, where STM divides by those left. Without a reference, `strength` is ignored.
    Raises `ValueError` for `max_perplexity` without a reference.
    """
    if reference is None and max_perplexity is not None:
        raise ValueError("max_perplexity needs a reference model")

    def loss(model: PreTrainedModel, batch: Batch) -> Tensor:
        expected = answer_tokens(batch)[:, None]
        if reference is not None:
            with torch.no_grad():
                of_reference = reference(model, batch).float().log_softmax(-1)
            given = of_reference.gather(1, expected)
        of_model = answer_logits(model, batch).float().log_softmax(-1)
        own = of_model.gather(1, expected)
        each = -own
        if weighting == "probability":
            each = each * own.detach().exp()
        if max_perplexity is not None:
            each = each * (-given <= math.log(max_perplexity))
        total = each.sum()
        if reference is None or not strength:
            return total
        if form == "forward":
            return total + strength * kl_div(
                of_model, of_reference, reduction="sum", log_target=True
            )
        ratio = given - own
        return total + strength * (ratio.exp() - ratio - 1).sum()

    return loss
