"""How the workers of a group find each other over the network."""

import os
from typing import Any

import psutil
import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

_INTERFACE = "GLOO_SOCKET_IFNAME"


class ReachableConfig(TorchConfig):
    """Ray Train's own, but that gloo listens where Ray reaches the worker's node.

    By itself gloo takes the address of the host's name, which on many machines is 127.0.1.1.
    """

    @property
    def backend_cls(self) -> Any:
        """What Ray Train calls to set up the workers."""
        return _Backend


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        if len(set(worker_group.execute(ray.util.get_node_ip_address))) > 1:
            worker_group.execute(_listen_where_ray_does)
        super().on_start(worker_group, backend_config)


def _listen_where_ray_does() -> None:
    address = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if address in (each.address for each in addresses):
            os.environ.setdefault(_INTERFACE, name)
