"""Layer-wise relevance propagation (LRP) as an ordinary backward pass with modified rules."""

from agcl.lrp.composite import evaluating, relevance_backward
from agcl.lrp.families import (
    FAMILIES,
    attributed_linears,
    input_width,
    stored_transposed,
    weight_of,
)
from agcl.lrp.rules import RuleSet

__all__ = [
    "FAMILIES",
    "RuleSet",
    "attributed_linears",
    "evaluating",
    "input_width",
    "relevance_backward",
    "stored_transposed",
    "weight_of",
]
