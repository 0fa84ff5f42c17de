"""Starts or joins a Ray cluster, and computes what fits on it. No other module does either."""

import json
import logging
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from agcl.errors import InputError
from ray._private import utils

import pipeline
from pipeline.config.resources import Resources
from pipeline.errors import RayFailed

WORKER_NODES = "AGCL_WORKER_NODES"
"""Environment variable of an autoscaling cluster: the maximum number of worker nodes and what each
has, as in `{"count": 8, "CPU": 16, "GPU": 1}`. Ray itself does not report this."""
_START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
WORKER_ENVIRONMENT = {
    "PYTHONPATH": str(Path(pipeline.__file__).parent.parent),
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # Longer than replacing a lost node takes. Then `run_group` checks whether waiting can help.
    _START_TIMEOUT: "600",
}
_OBJECT_STORE_BYTES = 200 * 2**20


def check_address() -> None:
    """Raise `InputError` if no cluster answers at `RAY_ADDRESS`. Ray would retry for minutes."""
    address = os.environ.get("RAY_ADDRESS", "")
    if address.startswith(("http://", "https://")):
        raise InputError(
            f"RAY_ADDRESS: {address} takes jobs (`ray job submit`, jobs/CLUSTER.md); a run joins a "
            "cluster at HOST:6379"
        )
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdecimal()):
        return  # Not set, or a keyword such as "auto".
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise InputError(f"RAY_ADDRESS: no cluster answers at {address} ({error})") from None


@contextmanager
def cluster(resources: Resources) -> Iterator[int]:
    """Connect to the cluster at `RAY_ADDRESS`, or start one on this machine's loopback interface.

    Yields how many sessions can run at a time. A local cluster ends with the context. Raises
    `InputError` if no cluster answers or a session could never fit on it, and `RayFailed` if Ray
    does not start.
    """
    on_terminate = signal.getsignal(signal.SIGTERM)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    environment = {"env_vars": {k: v for k, v in WORKER_ENVIRONMENT.items() if k not in os.environ}}
    try:
        check_address()
        if os.environ.get("RAY_ADDRESS"):
            environment["env_vars"].pop("PYTHONPATH", None)  # Nodes have the code in another place.
            ray.init(log_to_driver=False, runtime_env=environment, logging_level=logging.ERROR)
        else:
            if _START_TIMEOUT in environment["env_vars"]:
                environment["env_vars"][_START_TIMEOUT] = "120"  # No node is replaced.
            cpus = max(_usable_cpus(), resources.num_workers * resources.cpus_per_worker)
            # A group of workers is five processes. Ray warns above four times the number of CPUs.
            os.environ.setdefault("RAY_worker_maximum_startup_concurrency", str(max(8, 2 * cpus)))
            for early in ("prestart_worker_first_driver", "enable_worker_prestart"):
                # Processes that would lack the runtime environment, and so never be used.
                os.environ.setdefault(f"RAY_{early}", "0")
            _start(
                address="local",  # Else it would join one that it finds on this machine.
                num_cpus=cpus,
                include_dashboard=False,  # Eleven more processes, at an address not shown.
                object_store_memory=_OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env=environment,
            )
        signal.signal(signal.SIGTERM, on_terminate)
    except (KeyboardInterrupt, SystemExit):  # Ray's SIGTERM handler raises the latter.
        ray.shutdown()
        raise KeyboardInterrupt from None
    except InputError:
        raise
    except Exception as error:  # Such as a slow raylet or a version mismatch; no common type.
        ray.shutdown()
        remedy = "" if os.environ.get("RAY_ADDRESS") else _remedy(error)
        raise RayFailed(f"Ray did not start: {error}{remedy}") from error
    try:
        yield side_by_side(resources, nodes())
    finally:
        ray.shutdown()


def _start(**options: Any) -> None:
    """Start Ray on this machine. On a busy one it may take longer than the 30 s that Ray waits."""
    with _interruptible():
        try:
            ray.init(**options)
        except Exception as error:
            if "timed out during startup" not in str(error):
                raise
            ray.shutdown()
            ray.init(**options)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Raise the `KeyboardInterrupt` of a Ctrl-C inside at the end, if nobody has raised it so far.

    Starting Ray forks, and Python drops what is raised in a hook of a fork, such as logging's.
    """
    before, interrupted = signal.getsignal(signal.SIGINT), False
    if threading.current_thread() is not threading.main_thread() or before is None:
        yield
        return

    def interrupt(number: int, frame: Any) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if interrupted:
        raise KeyboardInterrupt


def _usable_cpus() -> int:
    """CPUs that this process may use: fewer than the machine's in a container or with an affinity.

    More workers than that would share them, and memory for them may not be there.
    """
    cpus = int(utils.get_num_cpus(override_docker_cpu_warning=True))
    if hasattr(os, "sched_getaffinity"):  # Of Linux only.
        cpus = min(cpus, len(os.sched_getaffinity(0)))
    return max(1, cpus)


def _remedy(error: Exception) -> str:
    if "AF_UNIX" in str(error):
        return "; set RAY_TMPDIR to a folder with a short name"
    if isinstance(error, OSError) and ".ray" in Path(str(error.filename)).parts:
        return "; set HOME to a folder that can be written to"
    place = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    logs = Path(place) / "ray" / "session_latest" / "logs"
    return f"; if this machine is busy, try again; the logs are in {logs}"


def worker_resources(resources: Resources) -> dict[str, float]:
    """Ray resources of one worker."""
    gpu = {"GPU": resources.gpus_per_worker} if resources.gpus_per_worker else {}
    return {"CPU": resources.cpus_per_worker, **gpu}


def nodes() -> list[Mapping[str, float]]:
    """Resources of each node, including those that an autoscaling cluster can add (`WORKER_NODES`).

    Raises `InputError` if that variable is invalid.
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
    """How many sessions fit on the nodes at a time. Raises `InputError` if none does."""
    each = worker_resources(resources)
    # Tolerate rounding errors: 1 // 0.1 is 9.
    room = [min(int(node.get(n, 0) / much + 1e-6) for n, much in each.items()) for node in nodes]
    if sum(room) >= resources.num_workers:
        return sum(room) // resources.num_workers
    having = ", ".join(_described({name: node.get(name, 0) for name in each}) for node in nodes)
    raise InputError(
        f"resources: the cluster has room for {sum(room)} of {resources.num_workers} workers that "
        f"need {_described(each)} each (nodes: {having}); if it is autoscaling, set "
        f"{WORKER_NODES} (jobs/CLUSTER.md)"
    )


def _described(resources: Mapping[str, float]) -> str:
    return " and ".join(f"{much:g} {name}" for name, much in resources.items())
