"""The train stage with an adapter: LoRA factors are trained, the base model's weights are not."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from agcl.importance import Importance
from agcl.model import adapter, corda, models
from agcl.modulation import lora
from agcl.parallel import distributed
from agcl.tasks import Rows
from peft import PeftModel
from torch import Tensor

from pipeline.config import hub
from pipeline.stages.context import Context
from pipeline.stages.files import ADAPTER, named
from pipeline.stages.fit import fit, freeze, write_checks
from pipeline.stages.loss import loss_of
from pipeline.stages.protection import (
    Protection,
    base_directions,
    base_importance,
    basis_of,
    past_importances,
    protect,
    warn_of_missing,
)


def train_adapter(
    config: Mapping[str, Any],
    inputs: Mapping[str, Path],
    out_dir: Path,
    context: Context,
    rows: Rows,
) -> None:
    """Train LoRA factors on `model` and write them; with `merge`, also write the merged model.

    Resumes the factors of the input `adapter` if there is one, else starts new ones. CorDA also
    reads its initial factors from that adapter. A penalty keeps the factors orthogonal to the
    adapters in the inputs `adapter/...`.
    """
    settings = config["adapter"]
    size = {"rank": settings["rank"], "alpha": settings["alpha"]}
    start = inputs["adapter"] / ADAPTER if "adapter" in inputs else None
    model, initial = context.take_model(inputs["model"], config), None
    if start and settings["init"] == "corda":
        peft_model, initial = corda.attach(model, **size, start=start)
    else:
        peft_model = adapter.attach(model, **size, seed=config["seed"], start=start)
    model = peft_model.get_base_model()
    past, base = past_importances(inputs, context.device), base_importance(inputs, context.device)
    if context.is_rank_zero:
        warn_of_missing(config, past, base, context.warn)
    projects = any(item["kind"] == "project" for item in config["protect"])
    of_base = base_directions(base if projects else None, config, model.device)
    if settings["fresh"] and (past or base):
        protection = _protect_fresh(peft_model, config, past, base, of_base)
    else:
        # The factors A of an adapter that never saw the base model's inputs pass nothing of them.
        known = lora.keep_away(peft_model, of_base) if of_base else None
        protection = protect(model, past, config, known=known)
    earlier = lora.directions([path / ADAPTER for path in named("adapter/", inputs).values()])
    if earlier:
        overlap = lora.orthogonality(peft_model, earlier, strength=settings["orthogonal"])
        penalties: list[Callable[[], Tensor]] = [partial(_backward, overlap)]
        if protection.penalty:
            penalties.append(protection.penalty)
        protection.penalty = partial(_summed, penalties)
    freeze(model, protection, config["freeze"])
    fit(model, config, rows, context, protection, loss_of(config, inputs, context))
    write_checks(model, protection, config, len(rows), out_dir)
    if context.is_rank_zero:
        folder = inputs["model"]
        place = (out_dir / ADAPTER, *(hub.name_of(folder) or (folder,)))
        if initial is None:
            adapter.save(peft_model, *place)
        else:
            corda.save(peft_model, initial, *place)
    distributed.meet()  # Rank 0 writes alone; saving a sharded model is collective.
    end = rows[0].input_ids[-1]
    _finish(peft_model, settings, inputs["model"], out_dir, context, end)


def _protect_fresh(
    peft_model: PeftModel,
    config: Mapping[str, Any],
    past: list[Importance],
    base: Importance | None,
    of_base: Mapping[str, Tensor],
) -> Protection:
    """Prepare the config's `protect` for new factors.

    No importance of earlier factors applies to them, only that of the weights below them, and the
    inputs that the base model and earlier tasks used.
    """
    model = peft_model.get_base_model()
    protection, every = Protection(), [*([base] if base else []), *past]
    for item in config["protect"]:
        if item["kind"] == "penalty":
            strength = item["strength"]
            protection.penalty = lora.product_penalty(peft_model, every, strength=strength)
        else:
            basis = basis_of(item, past, of_base, config["seed"], model.device)
            protection.basis = lora.keep_away(peft_model, basis)
    protection.remember(model)
    return protection


def _finish(
    peft_model: PeftModel,
    settings: Mapping[str, Any],
    base: Path,
    out_dir: Path,
    context: Context,
    end: int,
) -> None:
    """Write the merged model, or only the tokenizer, and hold the model for the next stage."""
    tokenizer = models.load_tokenizer(base)
    if not settings["merge"]:
        if context.is_rank_zero:
            tokenizer.save_pretrained(out_dir)
        if settings["init"] != "corda":  # Which changed the weights below the factors.
            context.hold_model(adapter.removed(peft_model), base)
        return
    model = adapter.merged(peft_model)
    models.save(model, tokenizer, out_dir, end=end)
    context.hold_model(model, context.folder)


def _summed(penalties: Sequence[Callable[[], Tensor]]) -> Tensor:
    return torch.stack([penalise() for penalise in penalties]).sum()


def _backward(penalty: Callable[[], Tensor]) -> Tensor:
    value = penalty()
    value.backward()
    return value
