"""Whether a protection did what it promises, from the weights before and after a task."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from agcl.modulation.optimizer import GateOn

_SAMPLED = 2_000_000
"""Weights that the deciles are taken over, evenly spaced through all gated ones."""
_LEAST_GAP = 0.2
"""Difference of the mean gates of the outer deciles below which their movements say nothing."""


class ProtectionFailed(ArithmeticError):
    """Protected weights moved as if nothing protected them."""


def check(
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    *,
    gate: Mapping[str, Tensor] | None,
    on: GateOn,
    basis: Mapping[str, Tensor] | None,
    steps: int,
    transposed: Collection[str] = (),
) -> dict[str, Any]:
    """Measure gate and projection over a task of that many steps; None for what there is not.

    `movement_by_decile`, `projection_leak` and `directions_taken` are those of the functions
    below; `transposed` names weights stored (in, out). Raises `ProtectionFailed` where a projected
    layer leaks more than rounding explains, or the most protected tenth of the weights moved more
    than the least protected one.
    """
    measured: dict[str, Any] = {
        "movement_by_decile": None,
        "projection_leak": None,
        "directions_taken": None,
    }
    if gate:
        movement, gates = _deciles(before, after, gate)
        measured["movement_by_decile"] = movement
        if on == "update" and gates[0] - gates[-1] > _LEAST_GAP and movement[-1] > movement[0]:
            raise ProtectionFailed(
                f"the gate does not hold: the most protected weights moved {movement[-1]:.3g} "
                f"times the median, the least protected {movement[0]:.3g} times"
            )
    if basis:
        leaks = {
            name: _leak(before[name], after[name], u, name in transposed)
            for name, u in basis.items()
        }
        measured["projection_leak"] = max(leak for leak, _ in leaks.values())
        measured["directions_taken"] = directions_taken(basis)
        for name, (leak, rounding) in leaks.items():
            # Every step is rounded when it is added to the weight; steps near a weight's last place
            # err in the same direction each time.
            if leak > max(steps * rounding, 1e-3):
                raise ProtectionFailed(
                    f"the projection does not hold: {name} changed by {leak:.3g} of an unprotected "
                    "update for inputs of earlier tasks"
                )
    return measured


def movement_by_decile(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], gate: Mapping[str, Tensor]
) -> list[float]:
    """Median |ΔW| by decile of protection 1 - G, the most protected last, over all gated weights.

    In units of the overall median (of the mean, where the median is 0); all 0 where nothing moved.
    Taken over an evenly spaced sample of two million weights.
    """
    return _deciles(before, after, gate)[0]


def projection_leak(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], basis: Mapping[str, Tensor]
) -> float:
    """Largest over layers of ‖ΔW U‖ / (‖ΔW‖ sqrt(k / in)): 0 is kept, 1 as if unprotected."""
    return max((_leak(before[n], after[n], u)[0] for n, u in basis.items()), default=0.0)


def directions_taken(basis: Mapping[str, Tensor]) -> float:
    """Mean over layers of the share k / in of input directions that are protected."""
    return sum(u.shape[1] / u.shape[0] for u in basis.values()) / len(basis)


def _leak(
    before: Tensor, after: Tensor, basis: Tensor, transposed: bool = False
) -> tuple[float, float]:
    """The leak of one layer, and what rounding the weights once explains of it."""
    change = after.double() - before.double()
    change = change.T if transposed else change
    size = change.norm()
    if basis.shape[1] == 0 or size == 0:
        return 0.0, 0.0
    share = (basis.shape[1] / basis.shape[0]) ** 0.5
    leak = (change @ basis.to(change)).norm() / (size * share)
    unit = torch.finfo(after.dtype).eps * before.double().norm() / size
    return float(leak), float(unit)


def _deciles(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], gate: Mapping[str, Tensor]
) -> tuple[list[float], list[float]]:
    """Movement and mean gate by decile."""
    step = max(1, sum(g.numel() for g in gate.values()) // _SAMPLED)
    moved = torch.cat(
        [(after[n].flatten()[::step] - before[n].flatten()[::step]).abs().float() for n in gate]
    )
    gates = torch.cat([g.flatten()[::step].float().to(moved.device) for g in gate.values()])
    order = gates.argsort(descending=True, stable=True)
    unit = moved.median() if moved.median() > 0 else moved.mean()
    parts = [part for part in order.tensor_split(10) if len(part)]
    movement = [float(moved[part].median() / unit) if unit > 0 else 0.0 for part in parts]
    return movement, [float(gates[part].mean()) for part in parts]
