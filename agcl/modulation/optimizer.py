"""AdamW with its whole step gated and projected, weight decay included."""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from agcl.modulation import eight_bit as quantized
from agcl.modulation.rounding import Rounding, noise, round_into
from agcl.modulation.step import Piece, StepProtection, copies, undo
from agcl.parallel.sharding import first_row, local

GateOn = Literal["update", "gradient"]
Named = tuple[str, nn.Parameter]
_MEANS = ("exp_avg", "exp_avg_sq")
_MAGNITUDES = "_magnitudes"


class GatedAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` with two changes to the step ΔW of protected weights.

    `gate` multiplies element-wise: with `on="update"` the finished step (a constant factor on the
    gradient cancels, since Adam divides by the gradient's running magnitude); with
    `on="gradient"` the gradient before Adam, and the weight decay, which is the paper's form.
    `basis` then removes input directions from the step, ΔW (I - U Uᵀ).

    Where the gate is 1 the step is bit-identical to `torch.optim.AdamW(fused=True)`; where it is 0
    the weight does not change (without a basis, whose projection mixes a row's entries). Gates are
    stored in one byte, in steps of 1/255. Gates and states of sharded parameters are sharded alike;
    bases are replicated.

    With `rounding="stochastic"`, bfloat16 weights are stepped, gated and projected in float32, one
    chunk at a time, and rounded stochastically once per step. Their Adam states are float32: in
    bfloat16 the running square could not decay by a thousandth and would stay at its maximum. The
    random numbers depend on `seed`, the parameter's name and its step count, so they are the same
    on all ranks and after resuming. With `"nearest"`, bfloat16 weights are stepped as in torch and
    cannot be protected.

    With `eight_bit`, each of the two running means takes one byte per weight between steps and is
    expanded to float32 one chunk at a time. This applies to contiguous, unsharded tensors with at
    least 4096 float32 or stochastically rounded weights (see `agcl.modulation.eight_bit`).
    """

    def __init__(
        self,
        params: Iterable[Named] | Iterable[dict[str, Any]],
        *,
        gate: Mapping[str, Tensor] | None = None,
        basis: Mapping[str, Tensor] | None = None,
        transposed: Collection[str] = (),
        on: GateOn = "update",
        rounding: Rounding = "nearest",
        eight_bit: bool = False,
        seed: int = 0,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        """`params`: pairs (name, parameter), or groups `{"params": pairs, "weight_decay": 0.0}`.

        `gate` (out, in) and `basis` (in, k) are keyed by those names. `transposed` lists weights
        stored (in, out), such as GPT-2's; their gates are (in, out) too. Raises `ValueError` for an
        unknown `on`, an unknown parameter name, a wrong shape, and a protected parameter in half
        precision, unless it is bfloat16 and rounded stochastically: rounding to nearest would undo
        the protection.
        """
        given: list[Any] = list(params)
        if on not in get_args(GateOn):
            raise ValueError(f"on must be one of {get_args(GateOn)}, not {on!r}")
        by_name: dict[str, nn.Parameter] = {}
        for each in given:
            by_name.update(each["params"] if isinstance(each, dict) else [cast(Named, each)])
        super().__init__(given, lr, betas, eps, weight_decay, foreach=False)
        self.on, self.rounding, self.seed, self.eight_bit = on, rounding, seed, eight_bit
        self.names: dict[Tensor, str] = {parameter: name for name, parameter in by_name.items()}
        self.protection = StepProtection(
            by_name,
            gate=gate,
            basis=basis,
            transposed=transposed,
            rounded=rounding == "stochastic",
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step. Parameters without a gradient do not change."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.protection.follow_parameters()
        for group in self.param_groups:
            moving: list[Tensor] = [p for p in group["params"] if p.grad is not None]
            self._make_states(moving)
            in_chunks = [p for p in moving if self._in_chunks(p)]
            free = [p for p in moving if not self._in_chunks(p)]
            steps = [self.state[p]["step"] for p in free]
            whole = [Piece(p) for p in free]
            self._adamw(whole, free, _gradients(whole), steps, group, group["weight_decay"])
            keys = self._keys(in_chunks)
            for chunk in self.protection.chunks(in_chunks):
                self._chunk_step(chunk, group, keys)
            if in_chunks:  # Only now, since a parameter's pieces can be in several chunks.
                torch._foreach_add_([self.state[p]["step"] for p in in_chunks], 1)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load states without torch's cast of 8-bit and float32 states to the parameter's dtype.

        Raises `ValueError` if the states were saved with another setting of `eight_bit`.
        """
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        states = {
            parameter: state_dict["state"][number]
            for number, parameter in zip(numbers, parameters, strict=False)  # Torch checks it.
            if number in state_dict["state"]
        }
        for parameter, state in states.items():
            if (_MEANS[0] + _MAGNITUDES in state) is not self._is_quantized(parameter):
                raise ValueError("these states were saved with another setting of eight_bit")
        super().load_state_dict(state_dict)
        for parameter, state in states.items():
            # Torch leaves it where it was read unless the groups say `fused`, and fused steps need
            # it beside the parameter.
            step = state["step"].to(parameter.device, torch.float32, copy=True)
            self.state[parameter]["step"] = step
            if self._is_quantized(parameter) or self._rounds(parameter):
                for key in state.keys() - {"step"}:
                    exact = state[key].to(parameter.device, copy=True)
                    self.state[parameter][key] = exact

    def _in_chunks(self, parameter: Tensor) -> bool:
        """Whether a step needs float32 copies of the parameter or its states."""
        covers = self.protection.covers(parameter)
        return covers or self._rounds(parameter) or self._is_quantized(parameter)

    def _rounds(self, parameter: Tensor) -> bool:
        return self.rounding == "stochastic" and parameter.dtype == torch.bfloat16

    def _is_quantized(self, parameter: Tensor) -> bool:
        stepped_in_float32 = parameter.dtype == torch.float32 or self._rounds(parameter)
        return self.eight_bit and stepped_in_float32 and quantized.fits(parameter)

    def _make_states(self, parameters: list[Tensor]) -> None:
        for parameter in parameters:
            state = self.state[parameter]
            if state:
                continue
            state["step"] = torch.zeros((), device=parameter.device)
            dtype = torch.float32 if self._rounds(parameter) else parameter.dtype
            for key in _MEANS:
                if self._is_quantized(parameter):
                    state[key], state[key + _MAGNITUDES] = quantized.zeros(parameter)
                else:
                    state[key] = torch.zeros_like(parameter, dtype=dtype)

    def _keys(self, parameters: list[Tensor]) -> dict[Tensor, str]:
        """What the random numbers of this step of each rounded parameter depend on."""
        rounded = [p for p in parameters if self._rounds(p)]
        if not rounded:
            return {}
        steps = torch.stack([self.state[p]["step"] for p in rounded]).tolist()  # One device sync.
        return {
            p: f"{self.seed}/{int(step)}/{self.names[p]}"
            for p, step in zip(rounded, steps, strict=True)
        }

    def _chunk_step(
        self, pieces: list[Piece], group: dict[str, Any], keys: Mapping[Tensor, str]
    ) -> None:
        """Step one chunk from `StepProtection.chunks`: AdamW, gate and basis, rounding."""
        values = [piece.of(piece.parameter) for piece in pieces]
        values = [v.float() if self._rounds(v) else v for v in values]
        before, held = [], []
        if self.protection.covers(pieces[0].parameter):
            before = copies(values, like=values)
            held = self.protection.shares(pieces, values) if self.on == "gradient" else []
        gradients = [g.to(v.dtype) for g, v in zip(_gradients(pieces), values, strict=True)]
        steps = [self.state[piece.parameter]["step"] for piece in pieces]
        steps, decay = copies(steps, like=steps), group["weight_decay"]
        if held:
            torch._foreach_mul_(values, 1 - group["lr"] * decay)
            undo(values, before, held)
            scaled = [g * (1 - share) for g, share in zip(gradients, held, strict=True)]
            self._adamw(pieces, values, scaled, steps, group, weight_decay=0.0)
            self.protection.project(pieces, values, before)
        else:
            self._adamw(pieces, values, gradients, steps, group, decay)
            if before:
                self.protection.restrict(pieces, values, before)
        for piece, value in zip(pieces, values, strict=True):
            if piece.parameter in keys:
                _round(piece, value, keys[piece.parameter])

    def _adamw(
        self,
        pieces: list[Piece],
        values: list[Tensor],
        gradients: list[Tensor],
        steps: list[Tensor],
        group: dict[str, Any],
        weight_decay: float,
    ) -> None:
        """Torch's fused AdamW: one pass over values, gradients and states. Increments `steps`."""
        if not pieces:
            return
        first, second = ([self._mean(piece, key) for piece in pieces] for key in _MEANS)
        adamw(
            values,
            gradients,
            first,
            second,
            [],
            steps,
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=weight_decay,
            eps=group["eps"],
            maximize=False,
        )
        for key, of_key in zip(_MEANS, (first, second), strict=True):
            for piece, mean in zip(pieces, of_key, strict=True):
                if self._is_quantized(piece.parameter):
                    quantized.write(mean, *self._codes(piece, key), signed=key == "exp_avg")

    def _mean(self, piece: Piece, key: str) -> Tensor:
        """A piece's running mean: the state itself, or its values where it is quantized."""
        if self._is_quantized(piece.parameter):
            return quantized.read(*self._codes(piece, key), signed=key == "exp_avg")
        return piece.of(self.state[piece.parameter][key])

    def _codes(self, piece: Piece, key: str) -> tuple[Tensor, Tensor]:
        """A piece's codes and magnitudes, which share memory with the state."""
        state = self.state[piece.parameter]
        codes, magnitudes = piece.of(state[key]), state[key + _MAGNITUDES]
        first = (codes.storage_offset() - state[key].storage_offset()) // quantized.BLOCK
        return codes, magnitudes[first : first + codes.numel() // quantized.BLOCK]


def _gradients(pieces: list[Piece]) -> list[Tensor]:
    return [piece.of(cast(Tensor, piece.parameter.grad)) for piece in pieces]


def _round(piece: Piece, value: Tensor, key: str) -> None:
    """Round a piece's float32 value into its parameter."""
    weight, parameter = local(piece.of(piece.parameter)), piece.parameter
    if parameter.dim() == 0:
        round_into(weight, value, noise(key, torch.Size((1,)), 0, 1, weight.device)[0])
        return
    first = first_row(parameter) + (piece.rows.start if piece.rows else 0)
    drawn = noise(key, parameter.shape, first, len(weight), weight.device)
    round_into(weight, local(value), drawn)
