"""The network interface through which the workers of a group connect."""

import os
from typing import Any

import psutil
import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

_INTERFACE = "GLOO_SOCKET_IFNAME"


class ReachableConfig(TorchConfig):
    """Ray Train's `TorchConfig`, with gloo on the interface through which Ray reaches the node.

    By default, gloo uses the address that the host name resolves to, often 127.0.1.1.
    """

    @property
    def backend_cls(self) -> Any:
        """The class through which Ray Train sets up the workers."""
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
