"""Moments of which nothing is cut off, from and to matrices."""

from collections.abc import Mapping

from torch import Tensor

from agcl.importance import Moment
from agcl.importance.moment import of_matrix


def whole(matrix: Tensor) -> Moment:
    """The moment of a symmetric positive semidefinite matrix."""
    return of_matrix(matrix, float(matrix.trace()), keep=1)


def matrices(moments: Mapping[str, Moment]) -> dict[str, Tensor]:
    """What is kept of moments, (in, in) each."""
    return {name: moment.matrix() for name, moment in moments.items()}
