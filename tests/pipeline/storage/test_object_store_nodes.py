"""Jobs on nodes that share nothing but an object store; each has a cache that no other one sees."""

import json
import re
import subprocess
import tempfile
from pathlib import Path

import pytest
from reference.nodes import Cluster, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def bucket(server):
    return server.bucket()


@pytest.fixture
def cluster(server, bucket):
    if subprocess.run(["unshare", "--mount", "true"], check=False).returncode:
        pytest.skip("needs the right to mount")
    # Paths of sockets must be short.
    with tempfile.TemporaryDirectory(prefix="ra", dir="/tmp", ignore_cleanup_errors=True) as folder:
        cache = Path(folder) / "cache"
        cache.mkdir()
        environment = {**server.environment, "AGCL_STORAGE": bucket.uri, "AGCL_CACHE": str(cache)}
        cluster = Cluster(Path(folder), environment, own=cache)
        yield cluster
        cluster.end_workers()
        cluster.head.end()


def test_two_workers_on_two_nodes_lose_one_and_go_on_from_the_store(cluster, bucket):
    cluster.have(3)
    client = cluster.client()
    cluster.submit(
        *("lost", "name=lost", "training.epochs=300", "resources.checkpoint_minutes=0.02"),
        *("resources.num_workers=2", "training.micro_batch_size=8", "tracking.enabled=false"),
    )

    def has_checkpoint():
        return [name for name in bucket.names() if re.search(r"/train-1-.*\.checkpoint$", name)]

    try:
        wait_until(has_checkpoint, 240, "no checkpoint")
    except TimeoutError:
        pytest.fail(client.get_job_logs("lost"))
    before = {name: bucket.get(name) for name in bucket.names() if name.endswith("manifest.json")}
    assert before
    trainers = cluster.trainers()
    assert len(trainers) == 2
    trainers[0].lose()
    code, log = cluster.outcome(client, "lost")
    assert code == 0, log
    assert "lost a worker in train/1-harbour; restarting it" in log
    assert log.count(" done pretrain") == 1
    assert {name: bucket.get(name) for name in before} == before
    metrics = json.loads(bucket.get("lost/metrics.json"))
    assert len(metrics["accuracy_matrix"]) == 3
    assert not has_checkpoint()
    # The head has the results, and no model.
    (cache,) = cluster.own.iterdir()
    assert not list(cache.rglob("train-*/model.safetensors"))
    assert list(cache.rglob("lost/metrics.json")), list(cache.rglob("*"))
