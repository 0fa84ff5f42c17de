"""Moments by their leading directions, against the whole matrix."""

import pytest
import torch
from reference.moments import whole

from agcl.importance.moment import leading, of_factor, of_matrix, of_sketch, summed

WIDTH = 48


def tokens(count, seed=0, decay=0.9):
    """Rows of length 1 whose directions fade slowly, as a real layer's inputs do."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, WIDTH, generator=generator, dtype=torch.float64)
    rows *= decay ** torch.arange(WIDTH)
    return rows / rows.norm(dim=1, keepdim=True)


def second_moment(rows):
    return rows.T @ rows


def gaussian(columns, width=WIDTH):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(width, columns, generator=generator, dtype=torch.float64)


def sketched(matrix, columns, keep=1.0):
    test = gaussian(columns, len(matrix))
    return of_sketch(matrix @ test, test, float(matrix.trace()), keep=keep)


def nuclear(matrix):
    return float(torch.linalg.eigvalsh(matrix).abs().sum())


@pytest.mark.parametrize("make", [
    lambda matrix, keep: of_matrix(matrix, float(matrix.trace()), keep=keep),
    lambda matrix, keep: of_factor(torch.linalg.cholesky(matrix), float(matrix.trace()), keep=keep),
    lambda matrix, keep: sketched(matrix, WIDTH, keep),
])  # fmt: skip
@pytest.mark.parametrize("keep", [0.5, 0.95, 1])
def test_what_is_cut_off_is_the_stated_error(make, keep):
    matrix = second_moment(tokens(200))
    found = make(matrix, keep)
    values = torch.linalg.eigvalsh(matrix).flip(0)
    fewest = int((values.cumsum(0) < keep * values.sum() * (1 - 1e-12)).sum()) + 1
    assert len(found.energies) == fewest
    torch.testing.assert_close(found.energies, values[:fewest], rtol=1e-5, atol=1e-5)
    assert found.trace == pytest.approx(200)
    assert nuclear(matrix - found.matrix()) == pytest.approx(
        found.trace - float(found.energies.sum()), abs=1e-4
    )
    identity = torch.eye(fewest, dtype=torch.float64)
    torch.testing.assert_close(found.directions.T @ found.directions, identity, rtol=0, atol=1e-6)


def test_a_quarter_of_a_wide_input_is_kept_at_most():
    found = of_matrix(torch.eye(1280), 1280.0, keep=0.99)
    assert len(found.energies) == 320
    assert found.kept == pytest.approx(0.25)
    matrix = torch.eye(300)
    assert len(of_matrix(matrix, 300.0, keep=0.99).energies) == 256
    assert len(of_matrix(matrix, 300.0, keep=1).energies) == 300


def test_a_sketch_of_few_tokens_is_exact():
    matrix = second_moment(tokens(10))
    found = sketched(matrix, 12)
    assert len(found.energies) == 10
    torch.testing.assert_close(found.matrix(), matrix, rtol=0, atol=1e-7)


def test_a_sketch_misses_no_more_than_stated():
    """Tropp 2017, theorem 4.1, which holds in expectation; nothing is overstated."""
    matrix = second_moment(tokens(400))
    values = torch.linalg.eigvalsh(matrix).flip(0)
    for columns, rank in ((12, 4), (24, 8), (24, 16)):
        found = sketched(matrix, columns)
        best = of_factor(found.directions * found.energies.sqrt(), found.trace, keep=1)
        kept = best.directions[:, :rank] * best.energies[:rank] @ best.directions[:, :rank].T
        bound = (1 + rank / (columns - rank - 1)) * float(values[rank:].sum())
        assert nuclear(matrix - kept) < bound
        assert float(torch.linalg.eigvalsh(matrix - found.matrix())[0]) > -1e-6


def test_sketches_add_up_whatever_the_order_of_tokens():
    rows, test = tokens(300), gaussian(16)
    parts = [second_moment(part) @ test for part in (rows[200:], rows[:200])]
    whole_sketch = second_moment(rows) @ test
    torch.testing.assert_close(sum(parts), whole_sketch)


@pytest.mark.parametrize("keep", [0.6, 1])
def test_the_sum_of_tasks_is_that_of_their_matrices(keep):
    """As exact as stated: nothing is lost where all is kept, else at most what was cut off."""
    matrices = [second_moment(tokens(60, seed)) for seed in range(5)]
    parts = [of_matrix(m, float(m.trace()), keep=keep) for m in matrices]
    running = parts[0]
    for part in parts[1:]:
        running = summed([running, part], keep=keep)
    at_once = summed(parts, keep=keep)
    total = sum(matrices)
    assert pytest.approx(running.trace) == at_once.trace == pytest.approx(300)
    for found in (running, at_once):
        lost = found.trace - float(found.energies.sum())
        assert nuclear(total - found.matrix()) == pytest.approx(lost, abs=1e-3)
        assert lost == pytest.approx(0, abs=1e-4) if keep == 1 else 0 < lost < 0.65 * 300


def test_summing_nothing_is_an_error_and_one_moment_its_own_sum():
    with pytest.raises(ValueError, match="no moments"):
        summed([], keep=1)
    alone = whole(second_moment(tokens(9)))
    assert summed([alone], keep=0.5) is alone


@pytest.mark.parametrize("energy", [0.5, 0.8])
def test_directions_of_a_cut_moment_are_those_of_the_whole_one(energy):
    """Cutting the tail moves none of the leading directions; the number depends on the trace."""
    matrix = second_moment(tokens(200))
    cut = of_matrix(matrix, float(matrix.trace()), keep=0.95)
    expected, found = leading(whole(matrix), energy), leading(cut, energy)
    assert found.shape == expected.shape
    cosines = torch.linalg.svdvals(expected.T @ found)
    assert float(cosines.min()) == pytest.approx(1, abs=1e-9)
    known = torch.linalg.qr(torch.randn(WIDTH, 3, dtype=torch.float64))[0]
    expected, found = leading(whole(matrix), energy, known), leading(cut, energy, known)
    shared = torch.linalg.svdvals(expected.T @ found)
    assert abs(found.shape[1] - expected.shape[1]) <= 1
    assert float((shared > 0.999).sum()) >= min(found.shape[1], expected.shape[1]) - 1


def test_energy_that_is_not_kept_gives_all_that_is():
    cut = of_matrix(torch.eye(8), 8.0, keep=0.5)
    assert leading(cut, 0.9).shape == (8, 4)
    assert leading(cut, 0.2).shape == (8, 2)


def test_a_zero_moment_keeps_nothing():
    found = whole(torch.zeros(4, 4))
    assert (found.trace, found.kept, found.directions.shape) == (0.0, 1.0, (4, 0))
    assert summed([found, found], keep=1).directions.shape == (4, 0)
    assert leading(found, 0.9).shape == (4, 0)


def test_little_energy_is_not_taken_for_rounding():
    """As in real layers: many directions of little energy, which together hold one percent."""
    generator = torch.Generator().manual_seed(0)
    energies = torch.full((600,), 1e-5, dtype=torch.float64)
    energies[0] = 0.6
    gauss = torch.randn(600, 600, dtype=torch.float64, generator=generator)
    basis = torch.linalg.qr(gauss)[0]
    matrix = ((basis * energies) @ basis.T).float()
    found = of_matrix(matrix, float(energies.sum()), keep=1)
    assert found.kept == pytest.approx(1, abs=1e-4)
    assert len(found.energies) == len(matrix)
    assert summed([found, found], keep=1).kept == pytest.approx(1, abs=1e-4)


def test_rounding_is_not_taken_for_energy():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(20, 600, generator=generator) + 3 * torch.randn(1, 600, generator=generator)
    rows /= rows.norm(dim=1, keepdim=True)
    matrix = torch.zeros(600, 600)
    for _ in range(20):
        matrix.addmm_(rows.T, rows)
    assert len(of_matrix(matrix, 400.0, keep=1).energies) == 20
