"""OSFT through PEFT: train what is left of each weight beside its leading singular directions.

Orthogonal Subspace Fine-tuning (Nayak et al. 2025, arXiv 2504.07097; `peft.OSFConfig`). A weight is
W = U_high S_high V_high + U_low S_low V_low, its singular value decomposition cut at a rank. The
high part, what the model does most, is kept; U_low, S_low and V_low are trained, their gradients
projected off U_high and V_high. After a task the factors are merged, and the next one decomposes
the new weight, with a higher rank kept.

Everything is done as PEFT does it. It projects gradients only: Adam's division by running squares
and weight decay act on the projected gradient entry by entry, so steps do leave the subspace a
little (nothing brings the factors back, and the merged weight moves in the directions kept). The
forward pass adds the new low part and subtracts the old one; under bfloat16 autocast both are
rounded first, so that changes below 1/256 of a factor's entry do not show until they are merged.
Embeddings, norms and head are frozen.
"""

import re
from typing import cast

import torch
from peft import OSFConfig, PeftModel, get_peft_model
from peft.tuners.osf import OSFLayer
from torch import nn
from transformers import PreTrainedModel

from agcl.errors import InputError
from agcl.lrp import attributed_linears, stored_transposed
from agcl.parallel import distributed, sharding

_FACTORS = ".osf_svd_params."


def check(model: PreTrainedModel) -> None:
    """Raise `InputError` for a model that PEFT cannot decompose.

    That is one whose weights are sharded, or stored (in, out) as in GPT-2.
    """
    if sharding.is_sharded(model):
        raise InputError("subspace: PEFT cannot decompose the weights of a sharded model")
    if stored_transposed(model):
        raise InputError(
            f"subspace: {type(model).__name__} stores its weights as (in, out), which PEFT's OSF "
            "does not decompose"
        )


def attach(model: PreTrainedModel, *, preserved: float) -> PeftModel:
    """Decompose the attributed linear layers: only factors of the rest are trainable after it.

    Of every weight (out, in), the share `preserved` of its min(out, in) singular directions is
    kept, rounded down as in PEFT, but at least one. All ranks get the decomposition of rank 0.
    Raises `InputError` as `check` does, and `ValueError` for a share that is not between 0 and 1.
    """
    if not 0 < preserved < 1:
        raise ValueError(f"preserved must be between 0 and 1, not {preserved}")
    check(model)
    linears = {name.removesuffix(".weight"): m for name, m in attributed_linears(model).items()}
    narrow = [name for name, m in linears.items() if int(_rank(m) * preserved) == 0]
    config = OSFConfig(
        effective_rank=preserved,
        rank_pattern={f"{re.escape(name)}$": 1 for name in narrow},
        target_modules=list(linears),
        task_type="CAUSAL_LM",
    )
    peft_model = cast(PeftModel, get_peft_model(model, config))
    _share(peft_model)
    return peft_model


def factors(model: nn.Module) -> set[str]:
    """Names of the trainable factors in `model.named_parameters()`; none without `attach`."""
    return {name for name, _ in model.named_parameters() if _FACTORS in name}


def merged(peft_model: PeftModel) -> PreTrainedModel:
    """The model with the factors merged into its weights: W + U S V - U_low S_low V_low."""
    return cast(PreTrainedModel, peft_model.merge_and_unload()).requires_grad_(True)


def _rank(linear: nn.Module) -> int:
    return min(cast(nn.Linear, linear).weight.shape)


@torch.no_grad()
def _share(peft_model: PeftModel) -> None:
    """Directions are unique only up to signs and rounding, which may differ between machines."""
    for layer in peft_model.modules():
        if isinstance(layer, OSFLayer):
            for tensor in (*layer.osf_svd_params.parameters(), *layer.buffers()):
                distributed.broadcast(tensor, 0)
