"""LRP backward rules in gradient-times-input form: one function per equation.

Each rule leaves the forward value unchanged and alters only the gradient, so that an ordinary
backward pass propagates relevance divided by activation. Sources: Bach 2015 (LRP), Ali 2022
(conservative propagation, "cp"), Achtibat 2024 (AttnLRP, "attnlrp").
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

RuleSet = Literal["attnlrp", "cp", "gradient"]
"""`gradient` installs no rules: the ordinary backward pass, for comparison."""


class _ReplaceGradient(torch.autograd.Function):
    """Forward `output` unchanged; send `factor * gradient`, optionally centered, to `source`."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, output: Tensor, factor: Tensor, centered: bool) -> Tensor:
        ctx.save_for_backward(factor)
        ctx.centered = centered
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (factor,) = ctx.saved_tensors
        gradient = gradients[0] * factor
        if ctx.centered:
            gradient = gradient - gradient.mean(-1, keepdim=True)
        return gradient, None, None, None


def constant_scale(x: Tensor, y: Tensor, scale: Tensor, *, centered: bool = False) -> Tensor:
    """Normalization `y = scale(x) * x` with its scale held constant (AttnLRP eq. 17).

    `centered` is for `y = scale(x) * (x - mean(x)) + bias`; a bias absorbs relevance.
    """
    return _ReplaceGradient.apply(x, y.detach(), scale.detach(), centered)  # type: ignore[no-any-return, no-untyped-call]


def identity(x: Tensor, y: Tensor) -> Tensor:
    """Identity rule for an element-wise `y = a(x)` with a(0) = 0 (AttnLRP eq. 9).

    All relevance passes: the gradient factor is y/x. At x = 0 the relevance x·g is 0 for any
    factor, so the factor is set to 0.
    """
    return constant_scale(x, y, torch.where(x == 0, 0.0, y / torch.where(x == 0, 1.0, x)))


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """Return `x`; multiply its gradient by `factor` (the uniform rule, AttnLRP eq. 13)."""
    return constant_scale(x, x, torch.tensor(factor))


def attention_inputs(
    query: Tensor, key: Tensor, value: Tensor, rules: RuleSet
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value with the gradients that the rule set prescribes.

    attnlrp: both matmuls are bilinear, so each operand gets half of the product's relevance. Query
    and key pass through two matmuls and get a quarter, the value a half; softmax keeps its
    gradient. cp: attention weights are constant, and the value gets all relevance.
    """
    if rules == "cp":
        return query.detach(), key.detach(), value
    return scale_gradient(query, 0.25), scale_gradient(key, 0.25), scale_gradient(value, 0.5)


def lacks_kernel(query: Tensor, key: Tensor) -> bool:
    """Whether torch would hold all attention weights: in float32 on a GPU with grouped heads.

    Its efficient kernels take grouped heads in half precision only. Given a mask, transformers
    repeats key and value instead of passing groups.
    """
    grouped = key.shape[1] < query.shape[1]
    return query.is_cuda and query.dtype == torch.float32 and grouped


def attention(base: Callable[..., Any], rules: RuleSet) -> Callable[..., Any]:
    """Wrap `base`, a function of transformers' attention interface; its forward is unchanged."""

    def forward(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> Any:
        if (
            attention_mask is None
            and getattr(module, "is_causal", True)
            and lacks_kernel(query, key)
        ):
            tokens = query.shape[2]
            attention_mask = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device)
            attention_mask = attention_mask.tril().expand(len(query), 1, -1, -1)
        query, key, value = attention_inputs(query, key, value, rules)
        return base(module, query, key, value, attention_mask, **kwargs)

    return forward
