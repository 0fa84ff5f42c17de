"""Layer-wise relevance propagation (LRP) as an ordinary backward pass with modified rules."""

from agcl.lrp.composite import Trace, relevance_backward
from agcl.lrp.families import (
    FAMILIES,
    Family,
    UnsupportedArchitecture,
    architecture_of,
    attributed_linears,
    stored_transposed,
    weight_of,
)
from agcl.lrp.rules import RuleSet

__all__ = [
    "FAMILIES",
    "Family",
    "RuleSet",
    "Trace",
    "UnsupportedArchitecture",
    "architecture_of",
    "attributed_linears",
    "relevance_backward",
    "stored_transposed",
    "weight_of",
]
