"""`resources.timeout_minutes` reaches the group through which workers exchange tensors."""

import socket

import pytest
import torch
import torch.distributed as dist
from ray.train.torch import config as of_ray

from agcl.parallel import sharding
from pipeline.config.resources import Resources
from pipeline.execution.torch_backend import config_of


class OneWorker:
    """Takes the place of Ray Train's worker group: one worker, in this process."""

    def __len__(self):
        return 1

    def execute(self, function, *args, **options):
        return [function(*args, **options)]

    def execute_single(self, rank, function, *args, **options):
        return function(*args, **options)

    execute_single_async = execute_single


@pytest.fixture
def group_of(monkeypatch):
    """Runs Ray Train's own start of a group, and ends the group after the test."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for name in ("MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "lo" if name.startswith("GLOO") else "")
    monkeypatch.setattr(of_ray, "get_address_and_port", lambda: ("127.0.0.1", port))
    monkeypatch.setattr(of_ray, "_set_torch_distributed_env_vars", lambda: None)
    monkeypatch.setattr(of_ray.ray, "get", lambda values: values)

    def start(**settings):
        config = config_of(Resources(**settings))
        config.backend_cls().on_start(OneWorker(), config)
        return dist.group.WORLD

    yield start
    dist.destroy_process_group()


def seconds_of(group):
    return group._get_backend(torch.device("cpu")).options._timeout.total_seconds()


@pytest.mark.parametrize(("minutes", "seconds"), [(60.0, 3600), (90, 5400), (0.001, 1)])
def test_the_setting_is_the_timeout_of_every_collective(group_of, minutes, seconds):
    """Longer than Ray's 1800 s, shorter, and never 0, which would fail at once."""
    assert seconds_of(group_of(timeout_minutes=minutes)) == seconds


def test_workers_that_do_not_find_each_other_are_given_up_after_minutes():
    """A collective may wait an hour for a slow rank; a rank that never comes is another matter."""
    config = config_of(Resources(timeout_minutes=60))
    assert (config.timeout_s, config.collective_timeout_s) == (240, 3600)
    assert config_of(Resources(timeout_minutes=0.5)).timeout_s == 30


def test_a_sharded_model_uses_the_same_group(group_of, llama, monkeypatch):
    """Where torch sees a GPU, its `init_device_mesh` makes a group with torch's own timeout."""
    group = group_of(timeout_minutes=90)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    weight = sharding.shard(llama, torch.device("cpu")).lm_head.weight
    assert seconds_of(weight.device_mesh.get_group()) == 5400
    assert weight.device_mesh.get_group() is group
