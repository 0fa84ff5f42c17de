"""The loss of a train stage: cross-entropy, or one against a frozen reference model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agcl.loss import Loss, anchored_loss, frozen, summed_loss, without_adapter

from pipeline.stages.context import Context


def loss_of(config: Mapping[str, Any], inputs: Mapping[str, Path], context: Context) -> Loss:
    """The config's `loss`, with the input `reference` loaded if it is needed.

    On a GPU it is held in bfloat16, to save memory; on a CPU in the model's own type, since many
    CPUs have no bfloat16 instructions and are many times slower without. An adapter's own base
    model needs no second copy. Collective: call on every rank.
    """
    settings = config["loss"]
    if not settings:
        return summed_loss
    if "reference" not in inputs:
        return anchored_loss(None, **{**settings, "strength": 0.0})
    # CorDA changes the weights below the adapter.
    intact = config["adapter"] and config["adapter"]["init"] != "corda"
    if intact and inputs["reference"] == inputs["model"]:
        return anchored_loss(without_adapter, **settings)
    loading = dict(config["loading"])
    if context.device.type != "cpu":
        loading["dtype"] = "bfloat16"
    return anchored_loss(
        frozen(context.loaded(inputs["reference"], {"loading": loading})), **settings
    )
