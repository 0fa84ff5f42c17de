"""Attention of loaded models: torch's, where needed with keys and values repeated."""

from typing import Any

from torch import Tensor, is_autocast_enabled, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from agcl.lrp.rules import lacks_kernel

_NAME = "agcl_sdpa"


def repeat_where_needed(model: PreTrainedModel) -> None:
    """Let a model with `sdpa` hold no attention weights in float32 on a GPU. Not saved with it."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(_NAME)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> Any:
    """transformers' `sdpa`, which given no mask leaves grouped heads to torch."""
    if (
        attention_mask is None
        and lacks_kernel(query, key)
        and not is_autocast_enabled(query.device.type)  # Which rounds for the kernel.
    ):
        groups = query.shape[1] // key.shape[1]
        if kwargs.get("is_causal") is None:
            kwargs["is_causal"] = getattr(module, "is_causal", True)
        # Without a module there are no groups.
        none: Any = None
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
        return sdpa_attention_forward(none, query, key, value, None, **kwargs)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, AttentionMaskInterface()["sdpa"])
