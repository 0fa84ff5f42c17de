"""State that attribution keeps per linear layer: running values and sums of relevance."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from agcl.attribution.top_k import TopK
from agcl.lrp import weight_of
from agcl.model.forward import Precision
from agcl.parallel import distributed

Estimator = Literal["lrp", "grad_x_param", "fisher", "das"]
"""The value of an entry: relevance by LRP or by the ordinary gradient, diagonal Fisher information,
or standardized gradient."""


@dataclass(frozen=True)
class Selection:
    """Which rows and tokens of a batch are attributed. Computed once per batch for all layers."""

    rows: Tensor
    """Row indices, (selected rows,)."""
    tokens: Tensor
    """Indices into the flattened (rows, tokens) of the tokens that count toward moments."""

    def of(self, tensor: Tensor) -> Tensor:
        """The selected rows of a tensor; the tensor itself if all rows are selected."""
        return tensor if len(self.rows) == len(tensor) else tensor[self.rows]


class Collector:
    """Running statistics of one linear layer `z = W x + b`, W (out, in), fed by `hook`."""

    def __init__(
        self,
        layer: nn.Module,
        estimator: Estimator,
        top_k: int | None,
        running_values: Precision,
    ) -> None:
        weight = weight_of(layer).detach()
        self.transposed = isinstance(layer, Conv1D)
        self.layer, self.device, self.estimator = layer, weight.device, estimator
        # Computed in float32, or in float64 for a float64 model.
        dtype = torch.promote_types(weight.dtype, torch.float32)
        stored_dtype = torch.bfloat16 if running_values == "bfloat16" else dtype
        self.dtype = dtype
        self.top = TopK(top_k, weight.to(dtype), stored_dtype) if top_k else None
        self.sum = torch.zeros(() if top_k else weight.shape, dtype=dtype, device=self.device)
        self.count = 0
        self.finite = torch.ones((), dtype=torch.bool, device=self.device)

    def hook(self, layer: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        """The layer's forward hook: x and z are (rows, tokens, in) and (rows, tokens, out)."""
        if output.requires_grad:
            inputs, values = args[0].detach(), output.detach()
            output.register_hook(lambda gradient: self._backward(inputs, values, gradient))

    def start(self, selection: Selection) -> None:
        """Set the selection for the last forward pass. Call before its backward pass."""
        self.selection = selection
        self.count += len(selection.rows)

    def _backward(self, x: Tensor, z: Tensor, g: Tensor) -> None:
        """x (rows, tokens, in), z and g (rows, tokens, out); g is 0 outside the selected rows."""
        x, z, g = (self.selection.of(tensor).to(self.dtype) for tensor in (x, z, g))
        match self.estimator:
            case "fisher":
                for x_row, g_row in zip(x, g, strict=True):
                    self.sum += (g_row.T @ x_row).square()
            case "das":
                self.sum += g.flatten(0, 1).T @ x.flatten(0, 1)
            case _:
                self._add_relevance(x, g, z * g)

    def _add_relevance(self, x: Tensor, g: Tensor, relevance: Tensor) -> None:
        # FSDP has unsharded it for the backward pass.
        weight = weight_of(self.layer).detach().to(self.dtype)
        flow = relevance.abs().sum((1, 2))
        # A row without relevance in this layer counts as 0.
        g_scaled = torch.where(flow > 0, 1 / flow, 0)[:, None, None] * g
        if self.top is None:
            self.sum += weight * (g_scaled.flatten(0, 1).T @ x.flatten(0, 1))
        else:
            self.finite &= torch.isfinite(flow).all()
            self.top.insert_products(weight, x, g_scaled)

    def finish(self, *, merge: bool) -> None:
        """With `merge`, reduce over ranks, which had different batches."""
        if self.top is not None and not self.finite:
            # NaN compares false, so top-K never kept it; mark the layer.
            self.top.values.fill_(torch.nan)
        if not merge:
            return
        count = torch.tensor([self.top.count if self.top else self.count], device=self.device)
        counts = [int(part) for part in distributed.gather(count)]
        if self.top is None:
            distributed.sum_in_place([self.sum])
            self.count = sum(counts)
        else:
            parts = distributed.gather(self.top.values)
            for other, values in enumerate(parts):
                if other != distributed.rank():
                    self.top.merge(values, counts[other])

    def entries(self) -> Tensor:
        """The importance of every entry, in the parameter's own shape."""
        values = self.sum / self.count if self.top is None else self.top.mean()
        if self.estimator == "das":
            # Clamp: equal entries have standard deviation 0 and all get 0.
            values = (values - values.mean()) / values.std().clamp(min=1e-30)
            values = values.tanh().abs()
        return values.T.contiguous() if self.transposed else values
