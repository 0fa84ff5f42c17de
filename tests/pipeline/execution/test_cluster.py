"""What fits on a cluster, and that cluster.yaml and jobs/rayjob.yaml fit this repository."""

import contextlib
import json
import os
import signal
import subprocess
import tomllib
from pathlib import Path

import pytest
import ray
import yaml

from agcl.errors import InputError
from pipeline.config.check import check_inputs
from pipeline.config.loading import validate
from pipeline.config.resources import Resources
from pipeline.errors import RayFailed
from pipeline.execution import cluster

ROOT = Path(__file__).parents[3]
PINS = dict(
    line.split("==")
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if not line.startswith("#")
)
CLUSTER = yaml.safe_load((ROOT / "cluster.yaml").read_text())
RAYJOB, MLFLOW, SERVICE = yaml.safe_load_all((ROOT / "jobs" / "rayjob.yaml").read_text())
HEAD = {"node:__internal_head__": 1.0}


@pytest.fixture
def grown(monkeypatch):
    """The nodes that count on a cluster with these alive, and that says it grows to that."""

    def of(*alive, says=None):
        found = [{"Alive": True, "Resources": node} for node in alive]
        lost = {"Alive": False, "Resources": {"CPU": 64.0}}
        monkeypatch.setattr(ray, "nodes", lambda: [*found, lost])
        if says is not None:
            monkeypatch.setenv(cluster.WORKER_NODES, says)
        return cluster.nodes()

    return of


def test_workers_are_counted_by_node(grown):
    two_by_three = grown(HEAD, {"CPU": 3.0}, {"CPU": 3.0})
    wide = Resources(num_workers=1, cpus_per_worker=2)
    assert cluster.side_by_side(wide, two_by_three) == 2  # Not 3, though 6 CPUs are there.
    assert cluster.side_by_side(Resources(num_workers=4), two_by_three) == 1
    gpus = grown(HEAD, {"CPU": 16.0, "GPU": 2.0}, {"CPU": 16.0})
    assert cluster.side_by_side(Resources(gpus_per_worker=1), gpus) == 2
    shared = Resources(gpus_per_worker=0.1)
    assert cluster.side_by_side(shared, grown({"CPU": 64.0, "GPU": 1.0})) == 10  # 1 // 0.1 is 9.


def test_a_cluster_that_grows_counts_as_grown(grown):
    says = '{"count": 8, "CPU": 16, "GPU": 1}'
    resources = Resources(num_workers=2, cpus_per_worker=4, gpus_per_worker=1)
    assert cluster.side_by_side(resources, grown(HEAD, says=says)) == 4
    # Those that are up already are among the eight.
    assert cluster.side_by_side(resources, grown(HEAD, {"CPU": 16, "GPU": 1}, says=says)) == 4


def test_what_never_fits_is_one_line_with_the_way_out(grown):
    resources = Resources(gpus_per_worker=1, cpus_per_worker=4)
    with pytest.raises(InputError) as refused:
        cluster.side_by_side(resources, grown(HEAD, {"CPU": 2.0}))
    line = str(refused.value)
    assert line.startswith("resources: ")
    assert "room for 0 of 1 workers that need 4 CPU and 1 GPU each" in line
    assert "2 CPU and 0 GPU" in line
    assert cluster.WORKER_NODES in line


def test_a_cluster_that_does_not_answer_is_named_at_once(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with (
        pytest.raises(InputError, match=r"^RAY_ADDRESS: no cluster answers at 127\.0\.0\.1:1"),
        cluster.cluster(Resources()),
    ):
        pass


def test_ray_that_does_not_start_is_one_error_with_its_reason(monkeypatch):
    tried = []

    def fail(**options):
        tried.append(options)
        raise Exception("The current node timed out during startup.")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", fail)
    with (
        pytest.raises(RayFailed, match=r"did not start: .* timed out"),
        cluster.cluster(Resources()),
    ):
        pass
    assert len(tried) == 2  # A busy machine may make it the second time.


def test_an_interrupt_that_python_drops_in_a_fork_ends_the_start(monkeypatch):
    """Python ignores what is raised in a hook of a fork, such as logging's."""
    ended, handler = [], signal.getsignal(signal.SIGINT)

    def start(**options):
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", start)
    monkeypatch.setattr(ray, "shutdown", lambda: ended.append(True))
    with pytest.raises(KeyboardInterrupt), cluster.cluster(Resources()):
        pass
    assert ended
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize(
    ("quota", "allowed", "workers", "cpus"),
    [(64, 2, 1, 2), (3, 8, 1, 3), (64, 2, 4, 4), (0, 2, 1, 1)],
)
def test_a_cluster_here_has_the_cpus_that_this_process_may_use(
    monkeypatch, quota, allowed, workers, cpus
):
    """Of a container or an affinity; more only if the config asks for more."""
    given = []

    def fail(**options):
        given.append(options["num_cpus"])
        raise Exception("far enough")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray._private.utils.get_num_cpus", lambda **options: quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(allowed)))
    monkeypatch.setattr(ray, "init", fail)
    with pytest.raises(RayFailed), cluster.cluster(Resources(num_workers=workers)):
        pass
    assert given == [cpus]


@pytest.mark.parametrize("says", ["8", "{}", "[]", '{"count": "x", "CPU": 1}', "eight"])
def test_a_bad_description_of_the_cluster_is_named(grown, says):
    with pytest.raises(InputError, match=f"^{cluster.WORKER_NODES}: "):
        grown(HEAD, says=says)


def test_a_cluster_names_storage_and_mlflow_and_the_config_may_name_others(monkeypatch):
    monkeypatch.setenv("AGCL_STORAGE", "/mnt/agcl/storage")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    told = validate({"method": "sequential"})
    assert told.storage.root == Path("/mnt/agcl/storage")
    assert told.tracking.uri == "http://127.0.0.1:5000"
    own = validate({"storage": "/data", "tracking": {"uri": None}, "method": "sequential"})
    assert own.storage.root == Path("/data")
    assert own.tracking.uri is None


def test_a_storage_that_goes_with_the_job_is_refused():
    inside = "/tmp/ray/session_1/runtime_resources/working_dir_files/_ray_pkg_1a2b/storage"
    with pytest.raises(InputError, match=r"^storage: .*AGCL_STORAGE"):
        check_inputs(validate({"storage": inside, "method": "sequential"}))


def test_cluster_yaml_is_valid_for_ray():
    util = pytest.importorskip("ray.autoscaler._private.util")
    pytest.importorskip("jsonschema")
    util.validate_config(util.prepare_config(CLUSTER))


def test_the_variant_for_machines_of_ones_own_is_valid_for_ray():
    util = pytest.importorskip("ray.autoscaler._private.util")
    pytest.importorskip("jsonschema")
    left_out = ("available_node_types", "head_node_type", "max_workers")
    own = {key: value for key, value in CLUSTER.items() if key not in left_out}
    own["provider"] = {"type": "local", "head_ip": "10.0.0.1", "worker_ips": ["10.0.0.2"]}
    util.validate_config(util.prepare_config(own))


def environment_of(tmp_path, *commands):
    """Run setup commands that write ~/.bashrc, each twice as restarts do; the shell's variables."""
    for command in commands * 2:
        subprocess.run(["bash", "-c", command], env={"HOME": str(tmp_path)}, check=True)
    shown = subprocess.run(
        ["bash", "-c", "source ~/.bashrc; env -0"],
        env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return dict(line.split("=", 1) for line in shown.split("\0") if line)


def test_cluster_yaml_tells_jobs_where_things_are_and_what_it_grows_to(tmp_path):
    commands = [*CLUSTER["setup_commands"], *CLUSTER["head_setup_commands"]]
    found = environment_of(tmp_path, *(c for c in commands if c.endswith(">> ~/.bashrc")))
    types = {k: v for k, v in CLUSTER["available_node_types"].items() if k != "head"}
    says = json.loads(found[cluster.WORKER_NODES])
    assert says.pop("count") == CLUSTER["max_workers"]
    assert all(node["resources"] == says for node in types.values())
    assert found["RAY_AUTH_MODE"] == "token"
    assert found["PATH"].split(":")[0] == f"{tmp_path}/agcl/venv/bin"
    assert any(f" {Path(found['AGCL_STORAGE']).parent})" in c for c in commands)  # Mounted.
    (mlflow,) = [c for c in CLUSTER["head_start_ray_commands"] if "mlflow server" in c]
    assert f"--port {found['MLFLOW_TRACKING_URI'].rpartition(':')[2]} " in mlflow


def test_only_workers_are_spot_machines():
    """Losing the head ends every job."""
    options = {
        name: node["node_config"].get("InstanceMarketOptions")
        for name, node in CLUSTER["available_node_types"].items()
    }
    assert options == {"head": None, "gpu": {"MarketType": "spot"}}


def test_every_dependency_is_pinned_where_nodes_install_from():
    (install,) = [c for c in CLUSTER["setup_commands"] if "pip install" in c]
    for name in ("pyproject.toml", "constraints.txt"):
        assert name in install
        assert CLUSTER["file_mounts"][f"/home/ubuntu/agcl/{name}"] == f"./{name}"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "--extra pipeline" in install
    lines = [*project["dependencies"], *project["optional-dependencies"]["pipeline"]]
    names = {line.partition("[")[0].partition(">")[0] for line in lines}
    missing = {name.lower() for name in names} - {pin.lower() for pin in PINS}
    assert missing == set()


def test_the_kubernetes_job_fits_the_repository():
    spec = RAYJOB["spec"]["rayClusterSpec"]
    assert spec["rayVersion"] == PINS["ray"]
    assert spec["authOptions"] == {"mode": "token"}
    head = spec["headGroupSpec"]["template"]["spec"]
    (group,) = spec["workerGroupSpecs"]
    worker = group["template"]["spec"]
    told = {each["name"]: each["value"] for each in head["containers"][0]["env"]}
    says = json.loads(told[cluster.WORKER_NODES])
    limits = worker["containers"][0]["resources"]["limits"]
    assert says == {
        "count": group["maxReplicas"],
        "CPU": int(limits["cpu"]),
        "GPU": int(limits["nvidia.com/gpu"]),
    }
    for pod in (head, worker):  # Storage is there on all nodes.
        (mount,) = pod["containers"][0]["volumeMounts"]
        assert told["AGCL_STORAGE"].startswith(mount["mountPath"])
        assert pod["volumes"] == [
            {"name": mount["name"], "persistentVolumeClaim": {"claimName": "agcl"}}
        ]
        assert pod["containers"][0]["image"].endswith(f":{PINS['ray']}")
    name, port = SERVICE["metadata"]["name"], SERVICE["spec"]["ports"][0]["port"]
    assert told["MLFLOW_TRACKING_URI"] == f"http://{name}:{port}"
    assert f"--port={port}" in MLFLOW["spec"]["template"]["spec"]["containers"][0]["command"]
    assert SERVICE["spec"]["selector"] == MLFLOW["spec"]["template"]["metadata"]["labels"]
    command = RAYJOB["spec"]["entrypoint"].split()
    assert command[:2] == ["agcl", "run"]
    assert (ROOT / command[2].removeprefix("/home/ray/agcl/")).is_file()


def test_an_address_for_jobs_is_told_from_that_of_a_cluster(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://localhost:8265")
    with pytest.raises(InputError, match=r"^RAY_ADDRESS: .*ray job submit.*HOST:6379$"):
        cluster.check_address()


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (OSError("AF_UNIX path length cannot exceed 107 bytes: /tmp/..."), "set RAY_TMPDIR"),
        (FileNotFoundError(2, "No such file or directory", "/proc/.ray"), "set HOME"),
        (ValueError("something else"), None),
    ],
)
def test_a_start_that_the_environment_prevents_says_what_to_set(monkeypatch, error, remedy):
    def fail(*args, **options):
        raise error

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", fail)
    with pytest.raises(RayFailed) as caught, cluster.cluster(Resources()):
        pass
    assert (remedy or "something else") in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
