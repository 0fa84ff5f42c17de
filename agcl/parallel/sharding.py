"""Models too large for one device: parameters sharded over ranks (FSDP2).

A sharded parameter is a `DTensor`; every rank holds some of its rows. Torch gathers a layer's
parameters before its forward and backward pass, and leaves each rank the sum over all ranks of its
rows' gradient (ZeRO stage 3, Rajbhandari 2020). Forward and backward passes are thus collective.
"""

from collections.abc import Iterable, Iterator
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from transformers import PreTrainedModel

from agcl.parallel import distributed


def shard(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Shard a model that every rank has loaded over the ranks' devices, layer by layer, in place.

    Besides its share, a device holds at most one layer, or embeddings and head. Needs an
    initialized process group.
    """
    # Not `init_device_mesh`, which may make another group, with torch's default timeout.
    group = cast(dist.ProcessGroup, dist.group.WORLD)
    mesh = DeviceMesh.from_group(group, device.type)
    for module in model.modules():
        if isinstance(module, nn.ModuleList):  # The layers, in every family.
            for layer in module:
                fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Sum, not average: the loss is already divided by the global number of tokens.
            module.set_gradient_divide_factor(1.0)
            # Else torch asks for a premultiplied sum. gloo has none, and that of nccl multiplies
            # bfloat16 gradients by 0 (torch 2.13, pytorch issue 190745).
            module.set_force_sum_reduction_for_comms(True)
    return model


def is_sharded(model: nn.Module) -> bool:
    """Whether a model was sharded by `shard`."""
    return isinstance(model, FSDPModule)


def whole(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor (collective); any other tensor is returned unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's shard, sharing memory; any other tensor is returned unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def placed_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Place a tensor like a parameter of its shape: same device and sharding.

    Every rank must have the whole tensor.
    """
    if not isinstance(parameter, DTensor):
        return tensor.to(parameter.device)
    # src_data_rank=None: every rank takes its own rows, without communication.
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(tensor.to(parameter.device), mesh, placements, src_data_rank=None)


def replicated_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Put a tensor that every rank has on a parameter's device, replicated over its mesh."""
    if not isinstance(parameter, DTensor):
        return tensor.to(parameter.device)
    mesh = parameter.device_mesh
    return DTensor.from_local(tensor.to(parameter.device), mesh, [Replicate()], run_check=False)


def first_row(tensor: Tensor) -> int:
    """The index in the whole tensor of the first row that this rank holds; 0 if not sharded."""
    if not isinstance(tensor, DTensor):
        return 0
    # As torch splits rows: equal parts, rounded up. Asking a tensor would wait for the device.
    mesh = tensor.device_mesh
    rows = -(-len(tensor) // mesh.size())
    return min(rows * mesh.get_local_rank(), len(tensor))


@torch.no_grad()
def copy_rows(target: Tensor, rows: Tensor, first: int) -> None:
    """Copy rows of the whole tensor, from row `first` on, into those of `target` on this rank."""
    own, start = local(target.detach()), first_row(target)
    low, high = max(first, start), min(first + len(rows), start + len(own))
    if low < high:
        own[low - start : high - start].copy_(rows[low - first : high - first])


def on_rank_zero(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Whole tensors on the CPU of rank 0; nothing on other ranks.

    Collective: every rank must exhaust the iterator, since gathering needs all ranks.
    """
    for name, tensor in tensors:
        gathered = whole(tensor.detach())
        if distributed.rank() == 0:
            yield name, gathered.cpu()
