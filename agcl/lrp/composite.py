"""Install a rule set on one model, reversibly: `with relevance_backward(model): ...`."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from agcl.lrp import rules as lrp_rules
from agcl.lrp.families import architecture_of, family_named, modules_named
from agcl.lrp.rules import RuleSet


@dataclass
class Trace:
    """What a relevance backward leaves to read: the input embeddings of the last forward."""

    embeddings: Tensor | None = field(default=None)

    def input_relevance(self) -> Tensor:
        """Relevance of every input token after `target.backward()`, shape (batch, tokens).

        That of its embedding: learned positions (GPT-2) take a share of their own.
        """
        if self.embeddings is None or self.embeddings.grad is None:
            raise RuntimeError("no backward has reached the embeddings inside relevance_backward")
        return (self.embeddings * self.embeddings.grad).sum(-1)


@contextmanager
def relevance_backward(model: PreTrainedModel, rules: RuleSet = "attnlrp") -> Iterator[Trace]:
    """Let backward passes of `model` follow LRP's rules inside the context.

    The forward is unchanged. At any activation `a`, `a * a.grad` is then its relevance for the
    scalar that `backward()` was called on. All weights have `requires_grad` off and the model is
    in eval mode inside; hooks, flags and attention are as before afterwards, exceptions included.

    Rule sets: `attnlrp` (Achtibat 2024), `cp` (Ali 2022; conserves relevance) and `gradient` (no
    rule). Raises `UnsupportedArchitecture` for a model family without a table.
    """
    if rules not in get_args(RuleSet):
        raise ValueError(f"rules must be one of {get_args(RuleSet)}, not {rules!r}")
    family = family_named(architecture_of(model))
    trace = Trace()

    def make_leaf(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        trace.embeddings = output.detach().requires_grad_()
        return trace.embeddings

    def on_norm(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        return family.norm(module, args[0], output)

    def on_activation(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        # Under cp a gate is a constant; what is no gate passes relevance on under any rules.
        if rules == "cp" and family.products:
            return output.detach()
        return lrp_rules.identity(args[0], output)

    def on_product(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        # Halving the product's gradient halves it in both branches (uniform rule). Under cp the
        # gate branch is already cut, and the other one takes all.
        return args if rules == "cp" else (lrp_rules.scale_gradient(args[0], 0.5),)

    with ExitStack() as undo:
        _freeze_and_eval(model, undo)
        undo.callback(model.get_input_embeddings().register_forward_hook(make_leaf).remove)
        if rules == "gradient":
            with torch.enable_grad():
                yield trace
            return
        _replace_attention(model, rules, undo)
        handles = [
            m.register_forward_hook(cast(Callable[..., Any], on_norm))
            for m in modules_named(model, family.norms).values()
        ]
        handles += [
            m.register_forward_hook(cast(Callable[..., Any], on_activation))
            for m in modules_named(model, family.activations).values()
        ]
        handles += [
            m.register_forward_pre_hook(cast(Callable[..., Any], on_product))
            for m in modules_named(model, family.products).values()
        ]
        for handle in handles:
            undo.callback(handle.remove)
        with torch.enable_grad():
            yield trace


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
    """Wrap the model's attention through transformers' registry (new keys only, none changed)."""
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
        # transformers keeps each family's eager attention beside its attention class.
        return sys.modules[type(module).__module__].eager_attention_forward(module, *args, **kwargs)

    return eager
