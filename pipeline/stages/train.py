"""Train: one task with the model of the last one, and what keeps the earlier tasks."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from agcl.importance import Importance
from agcl.lrp import attributed_linears, stored_transposed
from agcl.model import adapter, models
from agcl.model.forward import activation_checkpointing, compiled, quick_attention
from agcl.modulation import GatedAdamW, GateOn, bases, gates, lora, quadratic_penalty, random_bases
from agcl.modulation.checks import check
from agcl.parallel import sharding
from agcl.tasks import TRAIN, EncodedRows, MixedRows, Rows, sample
from agcl.train import train_task
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.stages.context import Context
from pipeline.stages.files import ADAPTER, CHECKS, IMPORTANCE_FILE, rows_file
from pipeline.storage.artifact import write_json


@dataclass
class Protection:
    """What the items of `protect` come to: gates, bases and a penalty, by parameter name."""

    gate: dict[str, Tensor] | None = None
    on: GateOn = "update"
    basis: dict[str, Tensor] | None = None
    penalise: Callable[[], Tensor] | None = None
    only: set[str] | None = None
    """The only parameters that are trained; None for all."""
    before: dict[str, Tensor] = field(default_factory=dict)
    """Copies, on the CPU, of the weights that are gated or projected; of the first worker alone."""

    def remember(self, model: torch.nn.Module) -> None:
        """Keep copies of what is protected, to see later how it moved."""
        protected = {**(self.gate or {}), **(self.basis or {})}
        chosen = ((name, p) for name, p in model.named_parameters() if name in protected)
        self.before = {name: copy.clone() for name, copy in sharding.on_first_worker(chosen)}


def pretrain(
    config: Mapping[str, Any], inputs: Mapping[str, Path], out_dir: Path, context: Context
) -> None:
    """Train the built-in model from scratch on its generic facts."""
    tokenizer = models.load_tokenizer(inputs["tokenizer"])
    model = context.placed(models.builtin_model(len(tokenizer), seed=config["seed"]))
    _fit(model, config, EncodedRows(inputs["rows"] / rows_file(TRAIN)), context, Protection())
    models.save(model, tokenizer, out_dir)
    context.hold_model(model, context.folder)


def train(
    config: Mapping[str, Any], inputs: Mapping[str, Path], out_dir: Path, context: Context
) -> None:
    """Train on `rows` from `model`, and write the model.

    Inputs named `importance/...` are protected, those named `replay/...` mixed in. With an
    adapter it is LoRA that is trained: `adapter` is the folder of one to go on with, on the
    weights of `model`, and those named `adapter/...` are kept orthogonal to. Without `merge` only
    the adapter is written.
    """
    rows = _rows(config, inputs)
    if config["adapter"]:
        _train_adapter(config, inputs, out_dir, context, rows)
        return
    model = context.take_model(inputs["model"])
    protection = protect(model, _past(inputs), config["protect"], config["seed"])
    _freeze(model, protection, config["freeze"])
    _fit(model, config, rows, context, protection)
    _check(model, protection, config, len(rows), out_dir)
    model.requires_grad_(True)
    models.save(model, models.load_tokenizer(inputs["model"]), out_dir)
    context.hold_model(model, context.folder)


def _past(inputs: Mapping[str, Path]) -> list[Importance]:
    """Those of stages were verified with their artifacts, unlike files from elsewhere."""
    return [
        Importance.load(path / IMPORTANCE_FILE, verify=False)
        if path.is_dir()
        else Importance.load(path)
        for path in _named("importance/", inputs)
    ]


def protect(
    model: PreTrainedModel, past: list[Importance], items: list[dict[str, Any]], seed: int
) -> Protection:
    """Prepare the items of the config's `protect` against what `past` importances say."""
    protection = Protection()
    for item in items if past else []:
        match item["kind"]:
            case "gate":
                protection.on = item["on"]
                protection.gate = gates(
                    past,
                    strength=item["strength"],
                    exponent=item["exponent"],
                    log_scale=item["log_scale"],
                )
            case "project":
                protection.basis = basis_of(item, past, seed, model.device)
            case "penalty":
                protection.penalise = quadratic_penalty(
                    dict(model.named_parameters()), past, strength=item["strength"]
                )
        if item["ungated"] == "freeze" and (item.get("strength") or item.get("energy")):
            protection.only = set(past[0].weights)
    protection.remember(model)
    return protection


def basis_of(
    item: Mapping[str, Any], past: list[Importance], seed: int, device: torch.device
) -> dict[str, Tensor]:
    """Input directions that a projection keeps, by weight; found on a device, given on the CPU."""
    basis = bases(past, energy=item["energy"], device=device)
    return random_bases(basis, seed=seed) if item["directions"] == "random" else basis


def _freeze(
    model: PreTrainedModel, protection: Protection, freeze: Mapping[str, Any] | None
) -> None:
    """Leave `requires_grad` on what is trained. A layer's index is the first number in a name.

    Where LoRA factors are attributed, only they are trained.
    """
    layers: set[int] = set()
    attributed = set(attributed_linears(model))
    has_factors = any(".lora_" in name for name in attributed)
    if freeze:
        half = range(model.config.num_hidden_layers // 2)
        layers = set(half if freeze["layers"] == "bottom_half" else freeze["layers"])
    for name, parameter in model.named_parameters():
        number = re.search(r"\.(\d+)\.", name)
        parameter.requires_grad_(
            (protection.only is None or name in protection.only)
            and not (number and int(number[1]) in layers)
            and not (freeze and freeze["ungated"] and name not in attributed)
            and (name in attributed or not has_factors)
        )


def _train_adapter(
    config: Mapping[str, Any],
    inputs: Mapping[str, Path],
    out_dir: Path,
    context: Context,
    rows: Rows,
) -> None:
    settings = config["adapter"]
    start = inputs["adapter"] / ADAPTER if "adapter" in inputs else None
    peft_model = adapter.attach(
        context.take_model(inputs["model"]),
        rank=settings["rank"],
        alpha=settings["alpha"],
        seed=config["seed"],
        start=start,
    )
    model = peft_model.get_base_model()
    past, protection = _past(inputs), Protection()
    if settings["fresh"] and past:
        (item,) = config["protect"]  # A projection: nothing else can be said of fresh factors.
        basis = basis_of(item, past, config["seed"], model.device)
        protection.basis = lora.keep_away(peft_model, basis)
        protection.remember(model)
    else:
        protection = protect(model, past, config["protect"], config["seed"])
    earlier = lora.directions([path / ADAPTER for path in _named("adapter/", inputs)])
    if earlier:
        overlap = lora.orthogonality(peft_model, earlier, strength=settings["orthogonal"])
        protection.penalise = partial(_backward, overlap)
    _freeze(model, protection, config["freeze"])
    _fit(model, config, rows, context, protection)
    _check(model, protection, config, len(rows), out_dir)
    if context.is_first_worker:
        adapter.save(peft_model, out_dir / ADAPTER, inputs["model"])
    _leave(peft_model, settings["merge"], inputs["model"], out_dir, context)


def _leave(peft_model: PeftModel, merge: bool, base: Path, out_dir: Path, context: Context) -> None:
    """Write the merged model, or only its tokenizer, and keep in memory what comes next."""
    tokenizer = models.load_tokenizer(base)
    if not merge:
        if context.is_first_worker:
            tokenizer.save_pretrained(out_dir)
        context.hold_model(adapter.removed(peft_model), base)
        return
    model = adapter.merged(peft_model)
    models.save(model, tokenizer, out_dir)
    context.hold_model(model, context.folder)


def _backward(penalty: Callable[[], Tensor]) -> Tensor:
    value = penalty()
    value.backward()
    return value


def _named(prefix: str, inputs: Mapping[str, Path]) -> list[Path]:
    return [path for role, path in inputs.items() if role.startswith(prefix)]


def _rows(config: Mapping[str, Any], inputs: Mapping[str, Path]) -> Rows:
    """The task's rows, and of each earlier task as many as `replay` says, at least one."""
    own = EncodedRows(inputs["rows"] / rows_file(TRAIN))
    parts: list[tuple[Rows, list[int]]] = [(own, list(range(len(own))))]
    for number, folder in enumerate(_named("replay/", inputs)):
        earlier = EncodedRows(folder / rows_file(TRAIN))
        count = max(1, round(config["replay"] * len(earlier)))
        parts.append((earlier, sample(len(earlier), count, seed=config["seed"] * 1000 + number)))
    return MixedRows(parts) if len(parts) > 1 else own


def _check(
    model: PreTrainedModel,
    protection: Protection,
    config: Mapping[str, Any],
    num_rows: int,
    out_dir: Path,
) -> None:
    """Write whether the protection held, if there is one; the first worker, with all others."""
    protected = {**(protection.gate or {}), **(protection.basis or {})}
    chosen = ((name, p) for name, p in model.named_parameters() if name in protected)
    after = dict(sharding.on_first_worker(chosen))
    if not after:
        return
    found = check(
        protection.before,
        after,
        gate=protection.gate,
        on=protection.on,
        basis=protection.basis,
        steps=config["epochs"] * math.ceil(num_rows / config["batch_size"]),
        transposed=stored_transposed(model),
    )
    write_json(out_dir / CHECKS, found)


def _fit(
    model: PreTrainedModel,
    config: Mapping[str, Any],
    rows: Rows,
    context: Context,
    protection: Protection,
) -> None:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gate, basis = (
        None if part is None else {name: part[name] for name in part if name in trained}
        for part in (protection.gate, protection.basis)
    )
    optimizer = GatedAdamW(
        trained.items(),
        lr=config["learning_rate"],
        weight_decay=config["weight_decay"],
        gate=gate,
        on=protection.on,
        basis=basis,
        transposed=stored_transposed(model) if basis else (),
    )
    with (
        quick_attention(model, config["precision"]),
        activation_checkpointing(model, config["activation_checkpointing"]),
        compiled(model, config["compile"]),
    ):
        train_task(
            model,
            rows,
            optimizer,
            epochs=config["epochs"],
            batch_size=config["batch_size"],
            micro_batch_size=config["micro_batch_size"],
            seed=config["seed"],
            schedule=config.get("schedule", "constant"),
            warmup=config.get("warmup", 0.0),
            precision=config["precision"],
            packing=config["packing"],
            max_gradient_norm=config["max_gradient_norm"],
            penalise=protection.penalise,
            checkpoint=context.checkpoint,
            log=context.log,
        )
