"""Self-checks: did a protection hold, judged by the weights before and after a task?"""

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from agcl.modulation.optimizer import GateOn
from agcl.modulation.rounding import gaps, rounding_noise

_SAMPLE_SIZE = 2_000_000
"""Weights in the sample for deciles, evenly spaced over all gated weights."""
_MAX_LEAK = 0.1
"""Leak that no number of rounded steps excuses. Steps of three times the weights' precision or
more stay below it."""
_MIN_GATE_GAP = 0.2
"""Minimum difference between the outer deciles' mean gates for their movements to be compared."""
SAMPLED_OUTPUTS = 512
"""Outputs checked per weight. A projection treats all outputs alike, so a sample suffices."""
_NOISE_MARGIN, _NOISE_SPREADS = 1.5, 4
"""Factors for the bound and the spread of rounding noise, whose sum is the allowed squared leak."""


class ProtectionFailed(ArithmeticError):
    """Protected weights moved as if they were not protected."""


def sampled(weight: Tensor, *, transposed: bool = False) -> Tensor:
    """The weight's entries for at most `SAMPLED_OUTPUTS` outputs, the same ones on every call.

    Keeps the copies of a model's weights for `check` small. Outputs are drawn with a fixed seed:
    even spacing could coincide with a period of the layer, such as the head size.
    """
    outputs = weight.shape[transposed]
    if outputs <= SAMPLED_OUTPUTS:
        return weight
    order = torch.randperm(outputs, generator=torch.Generator().manual_seed(0))
    chosen = order[:SAMPLED_OUTPUTS].sort().values.to(weight.device)
    return weight.index_select(int(transposed), chosen)


def check(
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    *,
    gate: Mapping[str, Tensor] | None,
    on: GateOn,
    basis: Mapping[str, Tensor] | None,
    steps: int,
    learning_rate: float = math.inf,
    transposed: Collection[str] = (),
) -> dict[str, Any]:
    """Measure gate and projection over a task of `steps` steps. A missing protection gives None.

    - `movement_by_decile`: median |ΔW| of gated weights by decile of protection 1 - G, most
      protected last, in units of the overall median (the mean if the median is 0).
    - `projection_leak`: maximum over layers of ‖ΔW U‖ / (‖ΔW‖ sqrt(k / in)); 0 is fully protected,
      about 1 unprotected.
    - `directions_by_layer`: fraction k / in of a layer's input directions that are protected, by
      weight; `directions_taken`: their mean.

    `before`, `after` and `gate` may be `sampled`. `transposed` lists weights stored (in, out).
    Raises `ProtectionFailed` if a projected layer leaks more than rounding explains, or, with
    `on="update"`, if the most protected decile moved more than the least protected one plus
    rounding, and more than the ratio of their gates times sqrt(steps): AdamW's steps are about
    equal in size, but those that agree in sign add up to sqrt(steps) times as much as random ones.
    bfloat16 weights are assumed to be rounded stochastically and are allowed the
    `rounding_noise` of steps at the peak `learning_rate`. If the sum of the steps is below that
    noise, they cannot fail.
    """
    measured: dict[str, Any] = {
        "movement_by_decile": None,
        "projection_leak": None,
        "directions_taken": None,
        "directions_by_layer": None,
    }
    if gate:
        movement, gates, noise = _deciles(before, after, gate, steps, learning_rate)
        measured["movement_by_decile"] = movement
        comparable = on == "update" and gates[0] - gates[-1] > _MIN_GATE_GAP
        most = max(1.0, steps**0.5 * gates[-1] / max(gates[0], 1e-9))
        if comparable and movement[-1] > most * movement[0] + noise:
            raise ProtectionFailed(
                f"the gate does not hold: the most protected weights moved {movement[-1]:.3g} "
                f"times the median, the least protected {movement[0]:.3g} times"
            )
    if basis:
        leaks = {
            name: _leak(before[name], after[name], u, name in transposed, steps, learning_rate)
            for name, u in basis.items()
        }
        measured["projection_leak"] = max(leak for leak, _ in leaks.values())
        shares = {name: u.shape[1] / u.shape[0] for name, u in basis.items()}
        measured["directions_taken"] = sum(shares.values()) / len(shares)
        measured["directions_by_layer"] = shares
        for name, (leak, rounding) in leaks.items():
            half = after[name].dtype == torch.bfloat16
            # Past _MAX_LEAK the projection is lost, even if only to rounding.
            # Where all directions are taken, whatever moved is such an error.
            most = math.inf if half or shares[name] == 1 else _MAX_LEAK
            if leak > min(max(rounding, 1e-3), most):
                too_small = rounding > _MAX_LEAK and not half
                raise ProtectionFailed(
                    f"the projection does not hold: for inputs of earlier tasks {name} changed by "
                    f"{leak:.3g} times an unprotected update"
                    + "; steps this small are lost in the weights' rounding, so raise the "
                    "learning rate" * too_small
                )
    return measured


def _leak(
    before: Tensor,
    after: Tensor,
    basis: Tensor,
    transposed: bool,
    steps: int,
    learning_rate: float,
) -> tuple[float, float]:
    """One layer's leak, and the leak that rounding the weights in every step can cause."""
    change = after.double() - before.double()
    change = change.T if transposed else change
    size = change.norm()
    if basis.shape[1] == 0 or size == 0:
        return 0.0, 0.0
    basis = basis.to(change)
    unit = size * (basis.shape[1] / basis.shape[0]) ** 0.5
    leak = (change @ basis).norm() / unit
    if after.dtype == torch.bfloat16:
        allowed = _leak_by_noise(before, after, basis, transposed, steps, learning_rate)
        return float(leak), float(allowed / unit)
    # Each step is rounded when added to the weight. For steps near the weight's precision the
    # errors all have the same sign, so the bound grows with the number of steps.
    return float(leak), float(steps * torch.finfo(after.dtype).eps * before.double().norm() / size)


def _leak_by_noise(
    before: Tensor,
    after: Tensor,
    basis: Tensor,
    transposed: bool,
    steps: int,
    learning_rate: float,
) -> Tensor:
    """Bound on ‖ΔW U‖ of bfloat16 weights whose steps have no part in U but for their rounding."""
    variance = rounding_noise(before, after, steps, learning_rate).double().square()
    jumps = variance * gaps(before, after).double().square()
    if transposed:
        variance, jumps = variance.T, jumps.T
    share = basis.square().sum(1)
    # Small steps are rare jumps over a whole gap. A few of them do not average.
    spread = (jumps @ share.square()).sum().sqrt()
    return (_NOISE_MARGIN * (variance @ share).sum() + _NOISE_SPREADS * spread).sqrt()


def _change(before: Tensor, after: Tensor) -> Tensor:
    """The difference, which bfloat16 could not hold."""
    return after.float() - before.float() if after.dtype == torch.bfloat16 else after - before


def _deciles(
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    gate: Mapping[str, Tensor],
    steps: int,
    learning_rate: float,
) -> tuple[list[float], list[float], float]:
    """Measure an evenly spaced sample of the gated weights, by decile of protection.

    Returns (movement per decile, mean gate per decile, how far rounding alone moves weights of the
    last decile, in the units of the movement).
    """
    step = max(1, sum(g.numel() for g in gate.values()) // _SAMPLE_SIZE)
    every = [(before[n].flatten()[::step], after[n].flatten()[::step]) for n in gate]
    moved = torch.cat([_change(old, new).abs().float() for old, new in every])
    noise = torch.cat(
        [rounding_noise(old, new, steps, learning_rate).expand(old.shape) for old, new in every]
    )
    gates = torch.cat([g.flatten()[::step].float().to(moved.device) for g in gate.values()])
    order = gates.argsort(descending=True, stable=True)
    unit = moved.median() if moved.median() > 0 else moved.mean()
    parts = [part for part in order.tensor_split(10) if len(part)]
    movement = [float(moved[part].median() / unit) if unit > 0 else 0.0 for part in parts]
    alone = float(noise[parts[-1]].median() / unit) if unit > 0 else 0.0
    return movement, [float(gates[part].mean()) for part in parts], alone
