"""The state of training by key: a weight, or an entry of the optimizer's state, of a parameter."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from agcl.files import shards
from agcl.parallel import distributed, sharding

_WEIGHT = "weight"


def held(parameters: Mapping[str, nn.Parameter], optimizer: Optimizer) -> dict[str, Tensor]:
    """Trained weights and optimizer state, not copied."""
    found: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        found[f"{_WEIGHT}/{name}"] = parameter
        for entry, value in optimizer.state.get(parameter, {}).items():
            found[f"{entry}/{name}"] = value
    return found


def fits(
    parameters: Mapping[str, nn.Parameter],
    layout: Mapping[str, Any],
    layouts: list[dict[str, shards.RowRange]],
) -> bool:
    """Whether file and parts hold something of exactly these parameters, and every row of it."""
    split = {key for each in layouts for key in each}
    names = {key.partition("/")[2] for key in (*layout, *split)}
    if names != set(parameters):
        return False
    return shards.are_whole(layouts, {k: parameters[k.partition("/")[2]].shape for k in split})


def load(
    parameters: Mapping[str, nn.Parameter],
    optimizer: Optimizer,
    tensors: Mapping[str, Tensor],
    layout: Mapping[str, tuple[torch.Size, torch.dtype]],
) -> None:
    """Send rank 0's whole `tensors` to all ranks, which know the `layout`, and take them over."""
    for key, (shape, dtype) in layout.items():
        entry, _, name = key.partition("/")
        parameter = parameters[name]
        tensor = tensors.get(key, torch.empty(shape, dtype=dtype)).to(parameter.device)
        distributed.broadcast(tensor, 0)
        if tensor.shape == parameter.shape:
            tensor = sharding.placed_like(tensor, parameter)
        if entry == _WEIGHT:
            parameter.data.copy_(tensor)
        else:
            optimizer.state[parameter][entry] = tensor


def rows_of(
    parameters: Mapping[str, nn.Parameter], optimizer: Optimizer, key: str, dtype: torch.dtype
) -> Tensor:
    """The tensor that a part's rows are copied into."""
    entry, _, name = key.partition("/")
    parameter = parameters[name]
    if entry == _WEIGHT:
        return parameter
    state = optimizer.state[parameter]
    if entry not in state:
        state[entry] = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
    return cast(Tensor, state[entry])
