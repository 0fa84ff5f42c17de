"""Projection: updates that do not change a layer's outputs for old tasks' inputs.

Prior art: Gradient Projection Memory (Saha 2021), Adam-NSCL (Wang 2021). New here: inputs are
weighted by the relevance that passes through them.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agcl.files import tensor_file
from agcl.importance import Importance
from agcl.importance.moment import leading, of_factor, of_matrix, summed
from agcl.parallel.sharding import whole

_KIND, _SAME = "bases", "same"


def bases(
    past: Sequence[Importance],
    *,
    energy: float,
    known: Mapping[str, Tensor] | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """Input directions to protect, per weight: (in, k) with orthonormal columns, on the CPU.

    The fewest leading directions of the past tasks' summed moments that hold the fraction `energy`
    (0 to 1) of the trace, or all stored directions if they hold less; energy 0 adds none. `known`
    are directions that are protected anyway, such as the base model's. They come first in the
    result, their share of the trace counts toward `energy`, and only the rest of the moment is
    decomposed, as GPM adds a task's directions (Saha 2021, eqs. 8 and 9). Weights that read the
    same input share one tensor if they also share their `known` tensor, or have none. Computed on
    `device`. Raises `ValueError` for an energy outside [0, 1], without importances, and for an
    importance without moments.
    """
    if not 0 <= energy <= 1:
        raise ValueError(f"energy is a fraction in [0, 1], not {energy}")
    if not past:
        raise ValueError("no importance of a past task to protect")
    if not all(i.moments for i in past):
        raise ValueError("an importance has no input moments; projection needs them")
    known = dict(known or {})  # Holds the tensors, so that their ids stay unique.
    by_input: dict[tuple[str, int], Tensor] = {}
    names = past[0].inputs or past[0].moments
    found = {name: tensor.cpu() for name, tensor in known.items() if name not in names}
    for name in names:
        key = past[0].input_of(name), id(known.get(name))
        if key not in by_input:
            moment = summed([i.moments[i.input_of(name)].to(device) for i in past], keep=1)
            by_input[key] = leading(moment, energy, known.get(name)).cpu()
        found[name] = by_input[key]
    return found


@torch.no_grad()
def weight_bases(
    weights: Mapping[str, Tensor], *, energy: float, transposed: Collection[str] = ()
) -> dict[str, Tensor]:
    """Input directions that each weight amplifies most, computed from the weights without data.

    Per weight W (out, in), the fewest leading right singular vectors that hold the fraction
    `energy` (0 to 1) of the squared singular values: (in, k) with orthonormal columns, float32, on
    the CPU. k = 0 for energy 0, and at most min(out, in). Weights that read the same input do not
    share directions. OPLoRA (arXiv 2510.13003; also for left singular vectors) and KeepLoRA (arXiv
    2601.19659) keep low-rank updates off these directions; OSFT (arXiv 2504.07097) freezes them and
    trains the others.

    Computed on the weights' device, from the eigenvectors of the smaller of W Wᵀ and Wᵀ W in
    float64. `transposed` lists weights stored (in, out). Collective for sharded weights. Raises
    `ValueError` for an energy outside [0, 1].
    """
    if not 0 <= energy <= 1:
        raise ValueError(f"energy is a fraction in [0, 1], not {energy}")
    found = {}
    for name, stored in weights.items():
        weight = whole(stored).double()
        weight = weight.T if name in transposed else weight
        trace = float(weight.square().sum())
        if len(weight) < weight.shape[1]:
            moment = of_factor(weight.T, trace, keep=1)
        else:
            moment = of_matrix(weight.T @ weight, trace, keep=1)
        found[name] = leading(moment, energy).to("cpu", torch.float32)
    return found


def save_bases(
    basis: Mapping[str, Tensor], file: Path | str, *, header: Mapping[str, Any] | None = None
) -> None:
    """Write bases to one file atomically, in float32; `header` is JSON, for the reader.

    A tensor that several weights share is written once.
    """
    first: dict[int, str] = {}
    same = {name: first.setdefault(id(tensor), name) for name, tensor in basis.items()}
    tensors = {name: basis[name].detach().to("cpu", torch.float32) for name in first.values()}
    tensor_file.write(Path(file), tensors, _KIND, {**(header or {}), _SAME: same})


def load_bases(file: Path | str) -> dict[str, Tensor]:
    """Read the bases of `save_bases`, on the CPU.

    Raises `InputError` naming the file if it is not a file of bases or its checksum is wrong.
    """
    file = Path(file)
    tensor_file.verify(file, _KIND)
    stored, header = tensor_file.open_file(file, _KIND)
    with stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    return {name: tensors[key] for name, key in header[_SAME].items()}


def random_bases(like: Mapping[str, Tensor], *, seed: int) -> dict[str, Tensor]:
    """Random orthonormal directions, as many per weight as in `like`: the projection's control."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.linalg.qr(torch.randn(basis.shape, generator=generator))[0]
        for name, basis in like.items()
    }


def projected_part(update: Tensor, basis: Tensor, *, transposed: bool = False) -> Tensor:
    """ΔW U Uᵀ, the part of an update that projection removes, without forming U Uᵀ.

    `update` is ΔW (out, in), or (in, out) if `transposed`; `basis` is U (in, k).
    """
    if transposed:
        return basis @ (basis.T @ update)
    return (update @ basis) @ basis.T
