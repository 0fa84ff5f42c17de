"""Projection: updates that do not change outputs for protected inputs."""

import pytest
import torch
from reference.moments import whole
from torch import nn

from agcl.errors import InputError
from agcl.importance import Importance
from agcl.importance.moment import leading, of_matrix
from agcl.modulation import (
    GatedAdamW,
    bases,
    load_bases,
    random_bases,
    save_bases,
    weight_bases,
)
from agcl.modulation.projection import projected_part

SPECTRUM = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)


def orthonormal(size, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    square = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(square).Q[:, :columns]


def moment(vectors, spectrum=SPECTRUM):
    return vectors @ torch.diag(spectrum) @ vectors.T


def test_projection_is_idempotent_and_orthogonal_to_the_basis():
    basis = orthonormal(6, 2)
    update = torch.randn(3, 6, dtype=torch.float64)
    once = update - projected_part(update, basis)
    torch.testing.assert_close(
        once @ basis, torch.zeros(3, 2, dtype=torch.float64), atol=1e-14, rtol=0
    )
    torch.testing.assert_close(once - projected_part(once, basis), once)
    inside = torch.randn(3, 2, dtype=torch.float64) @ basis.T
    shifted = update + inside
    torch.testing.assert_close(shifted - projected_part(shifted, basis), once)


@pytest.mark.parametrize(
    ("energy", "rank"),
    [(0.0, 0), (0.01, 1), (0.39, 1), (0.41, 2), (0.69, 2), (0.71, 3), (0.91, 4), (1.0, 4)],
)
def test_the_fewest_leading_directions_holding_the_energy(energy, rank):
    vectors = orthonormal(4, 4)
    found = leading(whole(moment(vectors)), energy).float()
    assert found.shape == (4, rank)
    expected = vectors[:, :rank] @ vectors[:, :rank].T
    torch.testing.assert_close((found @ found.T).double(), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.T @ found, torch.eye(rank), atol=1e-6, rtol=0)


def test_a_zero_moment_has_no_directions():
    assert leading(whole(torch.zeros(3, 3)), 0.9).shape == (3, 0)


def test_eigenvalues_rounded_below_zero_do_not_count():
    spectrum = torch.tensor([4.0, 1.0, -1e-9, -1e-9], dtype=torch.float64)
    assert leading(whole(moment(orthonormal(4, 4), spectrum)), 0.7).shape == (4, 1)


def past(*moments):
    return [Importance({"w": torch.ones(2, 4)}, {"w": whole(m.float())}) for m in moments]


def test_bases_span_what_all_past_tasks_used():
    """Two tasks with one direction each; neither alone covers the other's."""
    vectors = orthonormal(4, 4)
    first, second = (torch.outer(vectors[:, i], vectors[:, i]) for i in (0, 2))
    found = bases(past(3 * first, first + 2 * second), energy=0.99)["w"].double()
    assert found.shape == (4, 2)
    torch.testing.assert_close(found @ found.T, first + second, atol=1e-6, rtol=0)
    assert bases(past(3 * first, first + 2 * second), energy=0.6)["w"].shape == (4, 1)


def test_bases_need_moments():
    with_moments = past(torch.eye(4))
    without = [Importance({"w": torch.ones(2, 4)})]
    for importances in (without, with_moments + without, without + with_moments):
        with pytest.raises(ValueError, match="moments"):
            bases(importances, energy=0.5)


@pytest.mark.parametrize("energy", [80, -0.1, float("nan")])
def test_an_energy_that_is_no_fraction_is_refused(energy):
    past = [Importance({}, {"w": whole(torch.eye(3))})]
    with pytest.raises(ValueError, match=r"energy is a fraction in \[0, 1\], not"):
        bases(past, energy=energy)


def test_nothing_to_protect_is_refused():
    with pytest.raises(ValueError, match="no importance"):
        bases([], energy=0.5)


@pytest.mark.parametrize("on", ["update", "gradient"])
@pytest.mark.parametrize("gated", [True, False])
def test_adamw_with_weight_decay_preserves_outputs_for_protected_inputs(gated, on):
    generator = torch.Generator().manual_seed(0)
    parameter = nn.Parameter(torch.randn(5, 6, generator=generator, dtype=torch.float64))
    start = parameter.detach().clone()
    basis = orthonormal(6, 2)
    protected = basis @ torch.randn(2, 9, generator=generator, dtype=torch.float64)
    free = orthonormal(6, 6)[:, 2:]
    gate = {"w": torch.rand(5, 6, generator=generator)} if gated else None
    optimizer = GatedAdamW(
        [("w", parameter)], gate=gate, basis={"w": basis}, on=on, lr=0.1, weight_decay=0.1
    )
    for _ in range(6):
        parameter.grad = torch.randn(5, 6, generator=generator, dtype=torch.float64)
        optimizer.step()
    change = parameter.detach() - start
    torch.testing.assert_close(change @ protected, torch.zeros(5, 9).double(), atol=1e-13, rtol=0)
    assert (change @ free).norm() > 0.1


def test_a_projected_step_is_adamws_step_without_the_protected_directions():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    slope = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    basis, options = orthonormal(6, 2), {"lr": 0.1, "weight_decay": 0.1}
    plain, projected = (nn.Parameter(start.clone()) for _ in range(2))
    plain.grad, projected.grad = slope.clone(), slope.clone()
    torch.optim.AdamW([plain], **options).step()
    GatedAdamW([("w", projected)], basis={"w": basis}, **options).step()
    expected = start + (plain - start) @ (torch.eye(6).double() - basis @ basis.T)
    torch.testing.assert_close(projected.detach(), expected.detach())


def test_an_empty_basis_is_bit_identical_to_adamw():
    start, slope = torch.randn(3, 4), torch.randn(3, 4)
    plain, projected = (nn.Parameter(start.clone()) for _ in range(2))
    plain.grad, projected.grad = slope.clone(), slope.clone()
    torch.optim.AdamW([plain]).step()
    GatedAdamW([("w", projected)], basis={"w": torch.zeros(4, 0)}).step()
    assert torch.equal(plain, projected)


def test_random_directions_match_in_number_are_orthonormal_and_seeded():
    like = {"a": torch.zeros(12, 5), "b": torch.zeros(8, 0), "c": torch.zeros(6, 6)}
    drawn = random_bases(like, seed=1)
    for name, basis in drawn.items():
        assert basis.shape == like[name].shape
        torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]))
    assert torch.equal(drawn["a"], random_bases(like, seed=1)["a"])
    assert not torch.equal(drawn["a"], random_bases(like, seed=2)["a"])


def test_known_directions_come_first_and_what_they_hold_counts():
    """The task's moment is half in the known direction, the rest in two others."""
    vectors = orthonormal(5, 5)
    known = {"w": vectors[:, :1].float()}
    task = past(moment(vectors[:, :3], torch.tensor([5.0, 4.0, 1.0]).double()))
    task = [Importance({}, {"w": task[0].moments["w"]})]
    for energy, rank in ((0.3, 1), (0.5 - 1e-4, 1), (0.6, 2), (0.95, 3)):
        found = bases(task, energy=energy, known=known)["w"].double()
        assert found.shape == (5, rank)
        expected = vectors[:, :rank] @ vectors[:, :rank].T
        torch.testing.assert_close(found @ found.T, expected, atol=1e-6, rtol=0)


def test_a_basis_with_known_directions_holds_them_and_the_energy_and_is_orthonormal():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(40, 12, generator=generator, dtype=torch.float64)
    task = Importance({}, {"w": whole((inputs.T @ inputs).float())})
    known = orthonormal(12, 4, seed=3)
    found = bases([task], energy=0.9, known={"w": known.float()})["w"].double()
    torch.testing.assert_close(
        found.T @ found, torch.eye(found.shape[1]).double(), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(found @ (found.T @ known), known, atol=1e-6, rtol=0)

    def held(basis):
        return float((inputs @ basis).square().sum() / inputs.square().sum())

    assert held(found) >= 0.9 > held(torch.linalg.qr(found[:, :-1]).Q)


def test_weights_without_known_directions_are_as_before():
    task = [Importance({}, {"w": whole(moment(orthonormal(4, 4)).float())})]
    expected = bases(task, energy=0.7)["w"]
    for known in ({}, {"other": torch.eye(4)}, {"w": torch.zeros(4, 0)}):
        assert torch.equal(bases(task, energy=0.7, known=known)["w"], expected)


def test_bases_come_back_from_a_file_and_another_file_is_refused(tmp_path):
    basis = {"a": torch.linalg.qr(torch.randn(5, 2))[0], "b": torch.zeros(3, 0)}
    basis["c"] = basis["a"]  # Another weight that reads the same input.
    file = tmp_path / "base.safetensors"
    save_bases(basis, file, header={"energy": 0.7})
    found = load_bases(str(file))
    assert found.keys() == basis.keys()
    assert all(torch.equal(found[name], basis[name]) for name in basis)
    assert found["a"] is found["c"]
    Importance({}, {"a": whole(torch.eye(2))}).save(tmp_path / "importance")
    with pytest.raises(InputError, match="not an agcl bases file"):
        load_bases(tmp_path / "importance")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match="damaged"):
        load_bases(file)


def matrix(out, width, seed, dtype=torch.float32):
    """With singular values that fall by a quarter each, down to a thousandth."""
    rank = min(out, width)
    left, right = orthonormal(out, rank, seed), orthonormal(width, rank, seed + 1)
    return (left * 0.75 ** torch.arange(rank) @ right.T).to(dtype)


@pytest.mark.parametrize("energy", [0.3, 0.8, 0.95, 1.0])
@pytest.mark.parametrize(("out", "width"), [(9, 9), (24, 6), (6, 24), (1, 5), (5, 1)])
@pytest.mark.parametrize("transposed", [False, True])
def test_directions_of_a_weight_are_its_leading_right_singular_vectors(
    out, width, energy, transposed
):
    weight = matrix(out, width, seed=out)
    stored = weight.T.contiguous() if transposed else weight
    found = weight_bases({"w": stored}, energy=energy, transposed={"w"} if transposed else ())["w"]
    _, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    shares = values.square().cumsum(0) / values.square().sum()
    rank = min(int((shares < energy * (1 - 1e-12)).sum()) + 1, len(values))
    assert found.shape == (width, rank)
    assert found.dtype == torch.float32
    expected = right[:rank].T @ right[:rank]
    torch.testing.assert_close((found @ found.T).double(), expected, atol=2e-6, rtol=0)
    torch.testing.assert_close(found.T @ found, torch.eye(rank), atol=2e-6, rtol=0)


def test_directions_of_weights_are_each_ones_own_and_none_at_energy_zero():
    weights = {"q": matrix(8, 8, seed=1), "k": matrix(4, 8, seed=2), "none": torch.zeros(3, 4)}
    found = weight_bases(weights, energy=0.4)
    assert list(found) == list(weights)
    for name, weight in weights.items():
        assert torch.equal(found[name], weight_bases({name: weight}, energy=0.4)[name])
    assert found["q"].shape == found["k"].shape
    assert not torch.allclose(found["q"] @ found["q"].T, found["k"] @ found["k"].T, atol=0.1)
    assert found["none"].shape == (4, 0)
    assert {u.shape[1] for u in weight_bases(weights, energy=0).values()} == {0}
    with pytest.raises(ValueError, match=r"energy is a fraction in \[0, 1\], not 80"):
        weight_bases(weights, energy=80)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_leaves_what_a_weight_does_to_its_own_directions(dtype):
    """W V stays U S, while the other directions move."""
    weight = nn.Parameter(matrix(12, 10, seed=3, dtype=dtype))
    before = weight.detach().double()
    basis = weight_bases({"w": weight}, energy=0.9)
    rounding = "stochastic" if dtype == torch.bfloat16 else "nearest"
    optimizer = GatedAdamW(
        [("w", weight)], basis=basis, lr=1e-2, weight_decay=0.1, rounding=rounding
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        weight.grad = torch.randn(12, 10, generator=generator).to(dtype)
        optimizer.step()
    change, protected = weight.detach().double() - before, basis["w"].double()
    share = (change @ protected).norm() / change.norm()
    assert share < (1e-5 if dtype == torch.float32 else 0.1)
    assert change.norm() > 0.1
    again = weight_bases({"w": weight.float()}, energy=0.3)["w"].double()
    assert (protected.T @ again).norm() > 0.9 * again.shape[1] ** 0.5


def test_known_directions_of_weights_that_were_not_measured_stay():
    task = Importance({}, {"w": of_matrix(torch.eye(4), 4.0, keep=1)})
    known = {"other": torch.eye(3)[:, :1], "w": torch.eye(4)[:, :1]}
    found = bases([task], energy=0.2, known=known)
    assert torch.equal(found["other"], known["other"])


def test_weights_that_read_one_input_keep_their_own_known_directions():
    vectors = orthonormal(5, 5)
    shared = {"a": "a", "b": "a", "c": "a", "d": "a"}
    of_input = whole(moment(vectors[:, :3], torch.tensor([5.0, 4.0, 0.5]).double()).float())
    one, other = vectors[:, 3:4].float(), vectors[:, 4:].float()
    known = {"a": one, "b": other, "c": other}
    found = bases([Importance({}, {"a": of_input}, {}, shared)], energy=0.9, known=known)
    for name, expected in known.items():
        kept = found[name] @ (found[name].T @ expected)
        torch.testing.assert_close(kept, expected, atol=1e-6, rtol=0, msg=name)
    assert found["b"] is found["c"]
    assert found["d"].shape == (5, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_basis_that_is_not_orthonormal_is_refused(dtype):
    """It would reverse a step along a direction that it has twice."""
    weights = {n: nn.Parameter(torch.zeros(3, 64, dtype=dtype)) for n in ("a", "b")}
    basis = orthonormal(64, 40).float()

    def optimizer(second):
        return GatedAdamW(
            list(weights.items()), basis={"a": basis, "b": second}, rounding="stochastic"
        )

    for second in (basis, torch.eye(64), random_bases({"b": torch.empty(64, 64)}, seed=1)["b"]):
        optimizer(second)
        optimizer(second.bfloat16())
    for second in (
        torch.cat([basis, basis[:, :1]], 1),
        torch.cat([basis[:, :1], -basis[:, :1]], 1),
        basis * 2,
        basis * torch.nan,
    ):
        with pytest.raises(ValueError, match=r"the basis of b is not orthonormal.*torch.linalg.qr"):
            optimizer(second)
