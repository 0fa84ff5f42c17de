"""LRP backward rules in gradient-times-input form: one function an equation.

Every rule returns its input's forward value unchanged and only alters the gradient, so that an
ordinary backward pass propagates relevance divided by activation. Sources: Bach 2015 (LRP),
Ali 2022 (conservative propagation, "cp"), Achtibat 2024 (AttnLRP, "attnlrp").
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

RuleSet = Literal["attnlrp", "cp", "gradient"]
"""`gradient` installs no rule: the ordinary backward, for comparison."""


class _ReplaceGradient(torch.autograd.Function):
    """Pass `output` on as it is; send `factor * gradient`, centred if asked for, to `source`."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, output: Tensor, factor: Tensor, centred: bool) -> Tensor:
        ctx.save_for_backward(factor)
        ctx.centred = centred
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (factor,) = ctx.saved_tensors
        gradient = gradients[0] * factor
        if ctx.centred:
            gradient = gradient - gradient.mean(-1, keepdim=True)
        return gradient, None, None, None


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """Return `x`; multiply its gradient by `factor` (the uniform rule, AttnLRP eq. 13)."""
    return _ScaleGradient.apply(x, factor)  # type: ignore[no-any-return, no-untyped-call]


def identity(x: Tensor, y: Tensor) -> Tensor:
    """Identity rule of an element-wise `y = a(x)` with a(0) = 0: all relevance passes (eq. 9).

    The gradient factor is y/x. At x = 0 the relevance x·g is 0 whatever the factor, so 0 is safe.
    """
    factor = torch.where(x == 0, 0.0, y / torch.where(x == 0, 1.0, x))
    return _ReplaceGradient.apply(x, y.detach(), factor.detach(), False)  # type: ignore[no-any-return, no-untyped-call]


def constant_scale(x: Tensor, y: Tensor, scale: Tensor, *, centred: bool = False) -> Tensor:
    """Normalisation `y = scale(x) * x` with its scale held constant (AttnLRP eq. 17).

    `centred` is for `y = scale(x) * (x - mean(x)) + bias`; a bias takes relevance with it.
    """
    return _ReplaceGradient.apply(x, y.detach(), scale.detach(), centred)  # type: ignore[no-any-return, no-untyped-call]


def attention_inputs(
    query: Tensor, key: Tensor, value: Tensor, rules: RuleSet
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value with the gradients that the rule set prescribes.

    attnlrp: both matmuls are bilinear, each operand of one gets half of its relevance; query and
    key pass two of them, so they get a quarter, the value a half; softmax keeps its gradient.
    cp: attention weights are constants, the value takes all.
    """
    if rules == "cp":
        return query.detach(), key.detach(), value
    return scale_gradient(query, 0.25), scale_gradient(key, 0.25), scale_gradient(value, 0.5)


def attention(base: Callable[..., Any], rules: RuleSet) -> Callable[..., Any]:
    """An attention function of transformers' interface around `base`, forward unchanged."""

    def forward(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> Any:
        query, key, value = attention_inputs(query, key, value, rules)
        return base(module, query, key, value, attention_mask, **kwargs)

    return forward
