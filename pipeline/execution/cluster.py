"""The only place that starts or joins a Ray cluster, and knows what fits on it."""

import json
import logging
import os
import signal
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import ray
from agcl.errors import InputError

import pipeline
from pipeline.config.config import Resources
from pipeline.errors import RayFailed

WORKER_NODES = "AGCL_WORKER_NODES"
"""Environment variable of a cluster that adds nodes by itself, since Ray does not tell what it may
grow to: `{"count": 8, "CPU": 16, "GPU": 1}`, the most worker nodes and what each of them has."""
WORKER_ENVIRONMENT = {
    "PYTHONPATH": str(Path(pipeline.__file__).parent.parent),
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # Longer than a lost node takes to be replaced; then `run_group` looks whether there is hope.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",
}
_OBJECT_STORE_BYTES = 200 * 2**20


def check_address() -> None:
    """See whether a cluster answers at `RAY_ADDRESS`, if that is set: Ray would try for minutes.

    Raises `InputError`.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdecimal()):
        return  # Not set, or a word such as "auto".
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise InputError(f"RAY_ADDRESS: no cluster answers at {address} ({error})") from None


@contextmanager
def cluster(resources: Resources) -> Iterator[int]:
    """Connect to the cluster of `RAY_ADDRESS`, or start one on this machine on loopback.

    Yields how many sessions may run side by side. A local cluster ends with the context. Raises
    `InputError` where no cluster answers or it can never have room for a session, `RayFailed` where
    Ray does not start.
    """
    on_terminate = signal.getsignal(signal.SIGTERM)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    environment = {"env_vars": {k: v for k, v in WORKER_ENVIRONMENT.items() if k not in os.environ}}
    try:
        check_address()
        if os.environ.get("RAY_ADDRESS"):
            environment["env_vars"].pop("PYTHONPATH", None)  # Nodes have the code elsewhere.
            ray.init(log_to_driver=False, runtime_env=environment, logging_level=logging.ERROR)
        else:
            cpus = max(os.cpu_count() or 1, resources.num_workers * resources.cpus_per_worker)
            # Ray warns of four times as many, and a group of workers is five processes.
            os.environ.setdefault("RAY_worker_maximum_startup_concurrency", str(max(8, 2 * cpus)))
            ray.init(
                num_cpus=cpus,
                include_dashboard=False,  # Eleven processes more, and nothing shows its address.
                object_store_memory=_OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env=environment,
            )
        signal.signal(signal.SIGTERM, on_terminate)
    except SystemExit:  # From Ray's own handler of SIGTERM, which it puts in place as it begins.
        ray.shutdown()
        raise KeyboardInterrupt from None
    except InputError:
        raise
    except Exception as error:  # Ray's have no common type: a raylet too slow, another version.
        ray.shutdown()
        raise RayFailed(f"Ray did not start: {error}") from error
    try:
        yield side_by_side(resources, nodes())
    finally:
        ray.shutdown()


def needs(resources: Resources) -> dict[str, float]:
    """What one worker of a session takes, as Ray counts it."""
    gpu = {"GPU": resources.gpus_per_worker} if resources.gpus_per_worker else {}
    return {"CPU": resources.cpus_per_worker, **gpu}


def nodes() -> list[Mapping[str, float]]:
    """What each node has, counting those that the cluster can add by itself as `WORKER_NODES` says.

    Raises `InputError` where that cannot be read.
    """
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    text = os.environ.get(WORKER_NODES)
    if text is None:
        return alive
    try:
        grown = json.loads(text)
        added = [{name: float(grown[name]) for name in grown.keys() - {"count"}}] * grown["count"]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise InputError(
            f'{WORKER_NODES}: must be like {{"count": 8, "CPU": 16, "GPU": 1}}, not {text}'
        ) from None
    return [node for node in alive if "node:__internal_head__" in node] + added


def side_by_side(resources: Resources, nodes: list[Mapping[str, float]]) -> int:
    """How many sessions the nodes have room for at once. Raises `InputError` for none."""
    each = needs(resources)
    # Rounded up by a little: 1 // 0.1 is 9.
    room = [min(int(node.get(n, 0) / much + 1e-6) for n, much in each.items()) for node in nodes]
    if sum(room) >= resources.num_workers:
        return sum(room) // resources.num_workers
    having = ", ".join(_described({name: node.get(name, 0) for name in each}) for node in nodes)
    raise InputError(
        f"resources: the cluster has room for {sum(room)} of {resources.num_workers} workers that "
        f"need {_described(each)} each (nodes: {having}); if it adds nodes by itself, set "
        f"{WORKER_NODES} (jobs/CLUSTER.md)"
    )


def _described(resources: Mapping[str, float]) -> str:
    return " and ".join(f"{much:g} {name}" for name, much in resources.items())
