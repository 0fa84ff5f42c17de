"""The process group of a group of workers: backend, timeout, network interface."""

import os
from typing import Any

import psutil
import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

from pipeline.config.resources import Resources

_INTERFACE = "GLOO_SOCKET_IFNAME"


def config_of(resources: Resources) -> "ReachableConfig":
    """What Ray Train hands to torch's `init_process_group`.

    The timeout is that of every collective, since all run in the default group: Ray's default is
    30 minutes, and a group that torch made itself would have torch's, 10 minutes with nccl.
    """
    return ReachableConfig(
        backend="nccl" if resources.gpus_per_worker else "gloo",
        timeout_s=max(1, round(60 * resources.timeout_minutes)),
    )


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
