"""Moments of layer inputs: which layers share an input, and what is summed for each."""

import math
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from agcl.importance.moment import Moment, of_matrix, of_sketch
from agcl.lrp import evaluating, input_width, weight_of
from agcl.model.forward import any_dtype_attention
from agcl.parallel import distributed

MomentWeighting = Literal["relevance", "uniform", "answer"]


def shared_inputs(model: PreTrainedModel, linears: Mapping[str, nn.Module]) -> dict[str, str]:
    """The input that each layer reads, named after the first weight that reads it.

    Found by a forward pass of one token: query, key and value read the same tensor, for example, as
    do the factors A of their adapters. Collective for a sharded model.
    """
    first: dict[int, tuple[str, Tensor]] = {}
    found: dict[str, str] = {}

    def note(name: str, tensor: Tensor) -> None:
        # The tensor is held, so that no later one gets its place in memory.
        found[name], _ = first.setdefault(tensor.data_ptr(), (name, tensor))

    # In eval mode: with dropout each factor A would read a tensor of its own.
    with ExitStack() as hooks, evaluating(model), any_dtype_attention(model):
        for name, layer in linears.items():

            def hook(_: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                note(name, args[0])

            hooks.enter_context(layer.register_forward_pre_hook(hook))
        model(torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)
    return {name: found[name] for name in linears}


def test_matrix(width: int, columns: int, like: Tensor) -> Tensor:
    """Gaussian columns (width, columns) for sketches, the same for every run and rank."""
    generator = torch.Generator().manual_seed(width)
    numbers: Tensor = torch.randn(width, columns, generator=generator) / columns**0.5
    return numbers.to(device=like.device, dtype=like.dtype)


class InputMoment:
    """The running second moment Σ_t r_t d_t d_tᵀ of one input.

    `hook` goes on one of the layers that read the input. For narrow inputs the matrix itself is
    summed, for wide inputs its product with a `test` matrix. Both are sums over tokens, so they do
    not depend on how tokens are split into batches and over ranks.
    """

    def __init__(
        self,
        reader: nn.Module,
        weighting: MomentWeighting,
        unit_inputs: bool,
        test: Tensor | None,
    ) -> None:
        """With a `test` matrix (in, columns) a sketch is summed, without one the matrix itself."""
        weight = weight_of(reader)
        # Computed in float32, or in float64 for a float64 model.
        dtype = torch.promote_types(weight.dtype, torch.float32)
        width = input_width(reader)
        self.weighting, self.unit_inputs, self.test = weighting, unit_inputs, test
        columns = width if test is None else test.shape[1]
        self.sum = torch.zeros(width, columns, dtype=dtype, device=weight.device)
        self.totals = torch.zeros(3, dtype=torch.float64, device=weight.device)
        """Sum of r_t, number of tokens, trace."""
        self.inputs: Tensor | None = None
        self.arriving: Tensor | None = None
        self.tokens: Tensor | None = None

    def hook(self, reader: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        """The reader's forward hook: its input is (rows, tokens, in)."""
        inputs = args[0]
        self.inputs, self.arriving = inputs.detach(), None
        if self.tokens is not None:
            self.add()
        elif self.weighting == "relevance" and inputs.requires_grad:
            # The gradient of a tensor is complete once all of its readers are done.
            inputs.register_hook(self._arrive)

    def _arrive(self, gradient: Tensor) -> None:
        """Take the relevance |Σ_i x_ti g_ti| that arrives at each token's input."""
        self.arriving = (cast(Tensor, self.inputs) * gradient).sum(-1).abs()

    def add(self) -> None:
        """Add the tokens selected in `tokens`, indices into (rows · tokens), of the last pass.

        Tokens have equal weights without relevance weighting, and at inputs that no relevance
        reaches (the rule set `cp` cuts some off).
        """
        if self.inputs is None or self.tokens is None:
            return
        inputs = self.inputs.flatten(0, 1)[self.tokens].to(self.sum.dtype)
        lengths = torch.linalg.vector_norm(inputs, dim=-1)
        if self.arriving is None:
            relevance, roots = lengths.new_full((), len(lengths)), lengths.new_ones(())
        else:
            weights = self.arriving.flatten()[self.tokens].to(self.sum.dtype)
            relevance, roots = weights.sum(), weights.sqrt()
        self.inputs = self.arriving = None
        if self.unit_inputs:
            roots = torch.where(lengths == 0, 0, roots / lengths)
        scaled = lengths * roots
        # `new_full`, as `new_tensor` would copy from the CPU and make a GPU wait.
        count = lengths.new_full((), len(lengths))
        self.totals += torch.stack([relevance, count, scaled @ scaled])
        vectors = inputs * roots.unsqueeze(-1)
        if self.test is not None:
            self.sum.addmm_(vectors.T, vectors @ self.test)
            return
        # The matrix is symmetric: without its upper right quarter, which `moment` fills in.
        half = len(self.sum) // 2
        self.sum[:half, :half].addmm_(vectors.T[:half], vectors[:, :half])
        self.sum[half:].addmm_(vectors.T[half:], vectors)

    def moment(self, *, keep: float) -> Moment:
        """The moment with r_t scaled to mean 1. Overwrites the sum."""
        relevance, tokens, trace = self.totals.tolist()
        scale = tokens / relevance if relevance else 1.0
        if not math.isfinite(trace):  # Of a NaN or infinity in any input; shown by `check_finite`.
            nothing = torch.full((len(self.sum), 1), math.nan)
            return Moment(nothing, nothing[0].double(), trace)
        if self.test is not None:
            found = of_sketch(self.sum, self.test, trace, keep=keep)
        else:
            half = len(self.sum) // 2
            self.sum[:half, half:] = self.sum[half:, :half].T
            found = of_matrix(self.sum, trace, keep=keep)
        return Moment(found.directions.cpu(), found.energies.cpu() * scale, found.trace * scale)


def collected(
    inputs: Mapping[str, InputMoment],
    widths: Mapping[str, int],
    sizes: Mapping[str, int],
    like: Tensor,
    *,
    keep: float,
    merge: bool,
) -> dict[str, Moment]:
    """Decompose the sums and return every input's moment, on every rank, as CPU tensors.

    Collective. `widths` and `sizes` list the inputs of all ranks in the same order; each rank
    decomposes a share balanced by `sizes`. With `merge`, every rank holds all inputs, summed over
    different rows; otherwise it holds its share of the inputs, summed over all rows. `like` gives
    device and dtype.
    """
    ranks, rank = distributed.world_size(), distributed.rank()
    owners = dict(zip(widths, distributed.owners(list(sizes.values()), ranks), strict=True))
    for name, owner in owners.items() if merge else ():
        distributed.sum_in_place([inputs[name].sum, inputs[name].totals])
        if owner != rank:
            inputs[name].sum = like.new_empty(0)  # As each is done with: they are large.
    own: dict[str, Moment] = {}
    for name, moment in inputs.items():  # All ranks at once: nothing in here waits for another.
        if owners[name] == rank:
            own[name] = moment.moment(keep=keep)
            moment.sum = like.new_empty(0)
    return {
        name: _from_owner(own.get(name), owner, widths[name], like)
        for name, owner in owners.items()
    }


def _from_owner(moment: Moment | None, owner: int, width: int, like: Tensor) -> Moment:
    """The moment that one rank has, on every rank."""
    if distributed.world_size() == 1:
        return cast(Moment, moment)
    count = torch.tensor([len(moment.energies) if moment else 0], device=like.device)
    rank = int(distributed.broadcast(count, owner))
    numbers = torch.zeros(rank + 1, dtype=torch.float64, device=like.device)
    directions = like.new_empty(width, rank)
    if moment:
        directions.copy_(moment.directions)
        numbers[:rank], numbers[rank] = moment.energies, moment.trace
    directions = distributed.broadcast(directions, owner).cpu()
    numbers = distributed.broadcast(numbers, owner).cpu()
    return Moment(directions, numbers[:rank].clone(), float(numbers[rank]))
