"""Which weights and which inputs carried the right answers of a task."""

from agcl.attribution.attribute import Split, attribute
from agcl.attribution.collector import Estimator, MomentWeighting

__all__ = ["Estimator", "MomentWeighting", "Split", "attribute"]
