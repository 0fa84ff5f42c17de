"""The only place that starts or joins a Ray cluster."""

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray

from pipeline.config import Resources

WORKER_ENVIRONMENT = {
    "PYTHONPATH": str(Path(__file__).parent.parent),
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
_OBJECT_STORE_BYTES = 200 * 2**20


@contextmanager
def cluster(resources: Resources) -> Iterator[int]:
    """Connect to the cluster of `RAY_ADDRESS`, or start one on this machine on loopback.

    Yields how many train sessions may run side by side. A local cluster ends with the context.
    """
    on_terminate = signal.getsignal(signal.SIGTERM)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    session_cpus = resources.num_workers * resources.cpus_per_worker
    environment = {"env_vars": {k: v for k, v in WORKER_ENVIRONMENT.items() if k not in os.environ}}
    try:
        if os.environ.get("RAY_ADDRESS"):
            del environment["env_vars"]["PYTHONPATH"]
            ray.init(log_to_driver=False, runtime_env=environment, logging_level=logging.ERROR)
        else:
            ray.init(
                num_cpus=max(os.cpu_count() or 1, session_cpus),
                include_dashboard=True,
                dashboard_host="127.0.0.1",
                dashboard_port=0,
                object_store_memory=_OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env=environment,
            )
        signal.signal(signal.SIGTERM, on_terminate)
    except SystemExit:  # From Ray's own handler of SIGTERM, which it puts in place as it begins.
        ray.shutdown()
        raise KeyboardInterrupt from None
    try:
        total = ray.cluster_resources()
        side_by_side = int(total.get("CPU", 1)) // session_cpus
        if resources.use_gpu:
            side_by_side = min(side_by_side, int(total.get("GPU", 0)) // resources.num_workers)
        yield max(1, side_by_side)
    finally:
        ray.shutdown()
