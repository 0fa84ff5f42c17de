"""The process group of a group of workers: backend, timeout, network interface."""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psutil
import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

from pipeline.config.resources import Resources

_INTERFACE = "GLOO_SOCKET_IFNAME"
_MEETING_SECONDS = 240
"""Workers that are up find each other in seconds. If one does not, all are started again."""


def config_of(resources: Resources) -> "ReachableConfig":
    """The config that Ray Train passes to torch's `init_process_group`.

    `timeout_s` limits the rendezvous, `collective_timeout_s` every later collective. The latter
    works because all collectives use the default group: a new group would have torch's own
    timeout, 10 minutes with nccl. Ray's default is 30 minutes.
    """
    seconds = max(1, round(60 * resources.timeout_minutes))
    return ReachableConfig(
        backend="nccl" if resources.gpus_per_worker else "gloo",
        timeout_s=min(seconds, _MEETING_SECONDS),
        collective_timeout_s=seconds,
    )


@dataclass
class ReachableConfig(TorchConfig):
    """Ray Train's `TorchConfig`, with gloo on the interface through which Ray reaches the node.

    By default, gloo uses the address that the host name resolves to, often 127.0.1.1.
    """

    collective_timeout_s: int = 1800

    @property
    def backend_cls(self) -> Any:
        """The class through which Ray Train sets up the workers."""
        return _Backend


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        if len(set(worker_group.execute(ray.util.get_node_ip_address))) > 1:
            worker_group.execute(_listen_where_ray_does)
        super().on_start(worker_group, backend_config)
        worker_group.execute(_wait_in_collectives, backend_config.collective_timeout_s)


def _wait_in_collectives(seconds: int) -> None:
    from torch.distributed import distributed_c10d

    distributed_c10d._set_pg_timeout(timedelta(seconds=seconds))


def _listen_where_ray_does() -> None:
    address = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if address in (each.address for each in addresses):
            os.environ.setdefault(_INTERFACE, name)
