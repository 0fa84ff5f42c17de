"""Who owns what in a group of ranks."""

import pytest

from agcl.parallel import distributed


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_every_rank_owns_about_as_much_whatever_their_number(ranks):
    """Four inputs per layer, one of them wide: dealt in turn, one rank of four had all of these."""
    sizes = [4, 4, 4, 64] * 16
    found = distributed.owners(sizes, ranks)
    held = [sum(s for s, o in zip(sizes, found, strict=True) if o == r) for r in range(ranks)]
    assert sum(held) == sum(sizes)
    assert max(held) - min(held) <= 64
