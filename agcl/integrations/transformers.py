"""Protection inside transformers' `Trainer`, and trainers made from it such as TRL's `SFTTrainer`.

`Protect` is a callback that works around any optimizer; `gated_adamw` gives a `Trainer` agcl's own.
Both do the same arithmetic to a step, see `agcl.modulation.step`.
"""

import logging
import os
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from agcl.integrations.names import Found, find, freeze_others, keep_factors_away
from agcl.integrations.rows import attribute_dataset, protect_base, tokenize_rows
from agcl.modulation import GatedAdamW, GateOn
from agcl.modulation.step import Piece, StepProtection, copies

__all__ = [
    "Protect",
    "attribute_dataset",
    "freeze_others",
    "gated_adamw",
    "protect_base",
    "tokenize_rows",
]

_log = logging.getLogger(__name__)
_STEPS_ELSEWHERE = ("LayerWiseDummyOptimizer", "Lomo", "AdaLomo")
"""Optimizers that change weights during the backward pass, before a callback can see them."""


class Protect(TrainerCallback):  # type: ignore[misc]
    """Restrict every optimizer step: `Trainer(..., callbacks=[Protect(basis=basis)])`.

    `basis` (in, k) removes input directions from the step of a weight, `gate` multiplies it
    element-wise, as `GatedAdamW` does with `on="update"`; keys are the unwrapped model's parameter
    names. Of a PEFT model the LoRA factors A are kept off the basis: the adapter then outputs
    nothing for inputs in its span. Works with any optimizer that steps when it is told to, with
    gradient accumulation, clipping, float32 weights under bf16 or fp16 autocast, DDP and
    `torch.compile`; it has no state, so checkpoints resume as usual.

    Between a step's clipping and its end this takes one copy of the protected weights that have
    gradients, 4 bytes per weight; it is freed before the next forward pass. Gates take 1 byte
    per weight, bases 4 x in x k bytes per weight matrix.

    Training begins with a `ValueError` where protection could not hold: weights that the model
    does not have or in half precision, FSDP, DeepSpeed, adapters other than LoRA, optimizers that
    step during the backward pass or swap weights (schedule-free). Trained parameters without
    protection are logged as a warning; see `freeze_others`.
    """

    def __init__(
        self,
        *,
        basis: Mapping[str, Tensor] | None = None,
        gate: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Raises `ValueError` without a gate or basis."""
        if not (basis or gate):
            raise ValueError("nothing to protect: pass a basis, a gate or both")
        self.basis, self.gate = basis, gate
        self._protection: StepProtection | None = None
        self._before: list[tuple[list[Piece], list[Tensor]]] = []

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Any = None,
        **references: Any,
    ) -> None:
        """Find the weights, check that they can be protected, and keep new LoRA factors away."""
        if model is None:
            raise ValueError("a Trainer without a model cannot be protected")
        _refuse(args, optimizer)
        found = _found(model, self.gate, self.basis)
        self._protection = StepProtection(
            found.parameters, gate=found.gate, basis=found.basis, transposed=found.transposed
        )
        keep_factors_away(found)
        self._before = []

    @torch.no_grad()
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Remember the protected weights that are about to move."""
        protection = self._protection
        if protection is None:
            raise RuntimeError("Protect was added to a Trainer whose training had begun")
        protection.follow_parameters()
        moving = [p for p in {**protection.held, **protection.basis} if p.grad is not None]
        for chunk in protection.chunks(moving):
            values = [piece.of(piece.parameter) for piece in chunk]
            self._before.append((chunk, copies(values, like=values)))

    @torch.no_grad()
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Restrict the step that the optimizer has taken."""
        for chunk, before in self._before:
            if self._protection is not None:
                values = [piece.of(piece.parameter) for piece in chunk]
                self._protection.restrict(chunk, values, before)
        self._before = []

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Release gates and bases: a callback lives as long as its Trainer."""
        self._protection = None


def gated_adamw(
    args: TrainingArguments,
    *,
    basis: Mapping[str, Tensor] | None = None,
    gate: Mapping[str, Tensor] | None = None,
    on: GateOn = "update",
) -> tuple[Any, dict[str, Any]]:
    """`GatedAdamW` for a Trainer: `Trainer(..., optimizer_cls_and_kwargs=gated_adamw(args, ...))`.

    With the learning rate, betas, epsilon and weight decay of `args`, decayed parameters chosen as
    a Trainer chooses them. Equal to `Protect` around `optim="adamw_torch_fused"`, but holds a copy
    of a few weights at a time instead of all protected ones, and has the gate on the gradient.
    The same errors as of `Protect`, when the Trainer makes its optimizer.
    """
    if not (basis or gate):
        raise ValueError("nothing to protect: pass a basis, a gate or both")

    def make(model: nn.Module) -> GatedAdamW:
        _refuse(args, None)
        found = _found(model, gate, basis)
        # It does not look at the Trainer. Taken from there, the choice stays the Trainer's.
        decayed = set(Trainer.get_decay_parameter_names(cast(Any, None), model))
        trained = [(name, p) for name, p in found.parameters.items() if p.requires_grad]
        groups = [
            {"params": params, "weight_decay": decay}
            for params, decay in (
                ([each for each in trained if each[0] in decayed], args.weight_decay),
                ([each for each in trained if each[0] not in decayed], 0.0),
            )
            if params  # Torch takes an empty group for one without names.
        ]
        optimizer = GatedAdamW(
            groups,
            gate=found.gate,
            basis=found.basis,
            transposed=found.transposed,
            on=on,
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
        )
        keep_factors_away(found)
        return optimizer

    # A Trainer calls what it takes for a factory without arguments, and the result with the model.
    return (lambda: make), {}


def _found(
    model: nn.Module, gate: Mapping[str, Tensor] | None, basis: Mapping[str, Tensor] | None
) -> Found:
    found = find(model, gate, basis)
    if found.unprotected:
        _log.warning(
            "%d trained parameters are not protected, such as %s: freeze_others freezes them",
            len(found.unprotected),
            found.unprotected[0],
        )
    return found


def _refuse(args: TrainingArguments, optimizer: Any) -> None:
    """Raise `ValueError` for what would step past the protection."""
    for name, value in (("FSDP", args.fsdp), ("DeepSpeed", args.deepspeed)):
        # Set by `accelerate launch`.
        asked = os.environ.get(f"ACCELERATE_USE_{name.upper()}", "").lower() in ("1", "true")
        if value or asked:
            raise ValueError(
                f"{name} shards weights or keeps masters of them, so that protection would not "
                "hold: use DDP, or agcl's own runs for models larger than a device"
            )
    inner = getattr(optimizer, "optimizer", optimizer)  # Inside accelerate's wrapper.
    kind = type(inner).__name__
    if kind in _STEPS_ELSEWHERE:
        raise ValueError(f"{kind} changes weights during the backward pass: use another optimizer")
    if isinstance(inner, torch.optim.Optimizer) and hasattr(inner, "train"):
        raise ValueError(f"{kind} swaps the weights with others: use another optimizer")
