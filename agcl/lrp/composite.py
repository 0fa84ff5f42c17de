"""Install a rule set on a model, reversibly: `with relevance_backward(model): ...`."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from agcl.lrp import rules as lrp_rules
from agcl.lrp.families import architecture_of, family_named, modules_named
from agcl.lrp.rules import RuleSet


@contextmanager
def relevance_backward(model: PreTrainedModel, rules: RuleSet = "attnlrp") -> Iterator[None]:
    """Make backward passes of `model` follow LRP's rules inside the context.

    The forward pass is unchanged. At any activation `a`, `a * a.grad` is its relevance for the
    scalar that `backward()` was called on. Inside, the model is in eval mode and no weight requires
    a gradient. On exit, hooks, flags and attention are restored, even after an exception.

    Rule sets: `attnlrp` (Achtibat 2024), `cp` (Ali 2022; conserves relevance) and `gradient` (no
    rules). Raises `InputError` for a model family without a table.
    """
    if rules not in get_args(RuleSet):
        raise ValueError(f"rules must be one of {get_args(RuleSet)}, not {rules!r}")
    family = family_named(architecture_of(model))

    def make_leaf(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.detach().requires_grad_()

    def on_norm(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        return family.norm(module, args[0], output)

    def on_activation(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        # Under cp a gate is constant. An ungated activation passes all relevance in any rule set.
        if rules == "cp" and family.products:
            return output.detach()
        return lrp_rules.identity(args[0], output)

    def on_product(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        # Halving the product's gradient halves it in both branches (uniform rule). Under cp the
        # gate branch is already detached, and the other branch gets all relevance.
        return args if rules == "cp" else (lrp_rules.scale_gradient(args[0], 0.5),)

    with ExitStack() as undo:
        _freeze_and_eval(model, undo)
        undo.callback(model.get_input_embeddings().register_forward_hook(make_leaf).remove)
        hooks: list[tuple[Callable[..., Any], Callable[..., Any], tuple[str, ...]]] = [
            (nn.Module.register_forward_hook, on_norm, family.norms),
            (nn.Module.register_forward_hook, on_activation, family.activations),
            (nn.Module.register_forward_pre_hook, on_product, family.products),
        ]
        if rules != "gradient":
            _replace_attention(model, rules, undo)
            for register, hook, names in hooks:
                for module in modules_named(model, names).values():
                    undo.callback(register(module, hook).remove)
        undo.enter_context(torch.enable_grad())
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Forward passes in eval mode, without a graph."""
    with ExitStack() as undo:
        _freeze_and_eval(model, undo)
        undo.enter_context(torch.no_grad())
        yield


def _freeze_and_eval(model: nn.Module, undo: ExitStack) -> None:
    training = [(module, module.training) for module in model.modules()]
    required = [(p, p.requires_grad) for p in model.parameters()]

    def restore() -> None:
        for module, mode in training:
            module.training = mode
        for parameter, flag in required:
            parameter.requires_grad_(flag)

    undo.callback(restore)
    model.eval()
    model.requires_grad_(False)


def _replace_attention(model: PreTrainedModel, rules: RuleSet, undo: ExitStack) -> None:
    """Wrap the model's attention through transformers' registry, under a new key."""
    before = model.config._attn_implementation
    base = before if before in ("eager", "sdpa") else "sdpa" if model._supports_sdpa else "eager"
    key = f"agcl_{rules}_{base}"
    AttentionInterface.register(key, lrp_rules.attention(_attention_named(base), rules))
    AttentionMaskInterface.register(key, AttentionMaskInterface()[base])
    undo.callback(model.set_attn_implementation, before)
    model.set_attn_implementation(key)


def _attention_named(base: str) -> Callable[..., Any]:
    if base != "eager":
        return cast(Callable[..., Any], AttentionInterface()[base])

    def eager(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # transformers defines a family's eager attention in the module of its attention class.
        return sys.modules[type(module).__module__].eager_attention_forward(module, *args, **kwargs)

    return eager
