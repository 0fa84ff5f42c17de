"""Attribution: which weights and inputs produced the correct answers on a task."""

from agcl.attribution.attribute import Split, attribute
from agcl.attribution.collector import Estimator
from agcl.attribution.inputs import MomentWeighting

__all__ = ["Estimator", "MomentWeighting", "Split", "attribute"]
