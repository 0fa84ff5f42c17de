"""Models that no device holds whole: parameters sharded over the workers (FSDP2).

A sharded parameter is a `DTensor` of which every worker holds some rows; torch gathers a layer's
before its forward and backward, and leaves each worker the sum over all workers of its rows'
gradient (ZeRO stage 3, Rajbhandari 2020). So every forward and backward needs all workers at once.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from transformers import PreTrainedModel

from agcl.parallel import distributed


def shard(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Shard a model that every worker has, layer by layer, on to the workers' devices, in place.

    A device holds at most a layer, or embeddings and head, besides its share. Needs an initialised
    process group.
    """
    mesh = init_device_mesh(device.type, (distributed.world_size(),))
    for module in model.modules():
        if isinstance(module, nn.ModuleList):  # The layers, of every family.
            for layer in module:
                fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # Sums: the loss is divided by all its tokens.
            if device.type == "cpu":
                module.set_force_sum_reduction_for_comms(True)  # All that gloo has.
    return model


def is_sharded(model: nn.Module) -> bool:
    """Whether a model went through `shard`."""
    return isinstance(model, FSDPModule)


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor's values, gathered, which needs every worker; another one as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This worker's share of a sharded tensor, in the same memory; another one as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def placed_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A tensor that all workers have, of a parameter's shape, on its device and sharded like it."""
    if not isinstance(parameter, DTensor):
        return tensor.to(parameter.device)
    # None: every worker cuts out its own rows.
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(tensor.to(parameter.device), mesh, placements, src_data_rank=None)


def replicated_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A tensor that all workers have, on a parameter's device, as one that all keep whole."""
    if not isinstance(parameter, DTensor):
        return tensor.to(parameter.device)
    mesh = parameter.device_mesh
    return DTensor.from_local(tensor.to(parameter.device), mesh, [Replicate()], run_check=False)


def on_first_worker(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Each tensor whole and on the CPU, for the first worker; none for the others.

    Every worker must go through them to the end, since a sharded tensor takes all to gather.
    """
    for name, tensor in tensors:
        found = whole(tensor.detach())
        if distributed.rank() == 0:
            yield name, found.cpu()
