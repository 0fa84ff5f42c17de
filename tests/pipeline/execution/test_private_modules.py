"""The private and undocumented names of Ray that runs rely on. Ray may change them in any minor
version, which is why pyproject.toml allows only one."""

import inspect
import tomllib
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

import pytest
from reference.private import check_takes, found

import pipeline
from pipeline.execution.cluster import WORKER_ENVIRONMENT

TORCH, BACKEND = "ray.train.torch.config", "pipeline/execution/torch_backend.py"
WORKERS = "pipeline/execution/workers.py"


def test_ray_is_capped_to_the_minor_version_that_is_tested():
    project = tomllib.loads(
        (Path(pipeline.__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    )
    (ray,) = (
        line
        for line in project["project"]["optional-dependencies"]["pipeline"]
        if line.startswith("ray[")
    )
    major, minor = (int(part) for part in version("ray").split(".")[:2])
    assert ray.partition("]")[2] == f">={major}.{minor},<{major}.{minor + 1}"


def test_ray_train_starts_groups_of_workers_as_agcl_extends_it():
    check_takes(
        f"{TORCH}._TorchBackend.on_start", "self", "worker_group", "backend_config", user=BACKEND
    )
    settings = {field.name for field in fields(found(f"{TORCH}.TorchConfig"))}
    assert settings >= {"backend", "timeout_s"}, f"TorchConfig has {settings}; {BACKEND}"
    assert isinstance(
        inspect.getattr_static(found(f"{TORCH}.TorchConfig"), "backend_cls"), property
    )
    started = inspect.signature(found(f"{TORCH}._setup_torch_process_group")).parameters
    assert "timeout_s" in started, f"no timeout reaches torch any more: {list(started)}; {BACKEND}"
    check_takes(
        "ray.train.v2._internal.execution.worker_group.WorkerGroup.execute",
        "self",
        "fn",
        user=BACKEND,
    )


def test_a_group_that_finds_no_room_fails_with_the_error_that_agcl_knows():
    timeout = found("ray.train.v2._internal.exceptions.WorkerGroupStartupTimeoutError")
    error = found("ray.train.ControllerError")(timeout(2))
    assert error.controller_failure.args, f"ControllerError hides its cause; {WORKERS}"
    limits = {field.name for field in fields(found("ray.train.FailureConfig"))}
    assert limits >= {"max_failures", "controller_failure_limit"}, f"{limits}; {WORKERS}"


@pytest.mark.parametrize("name", [n for n in WORKER_ENVIRONMENT if n.startswith("RAY_")])
def test_ray_still_reads_the_environment_that_workers_get(name):
    constants = found("ray.train.v2._internal.constants.__dict__")
    assert name in constants.values(), f"Ray no longer reads {name}; pipeline/execution/cluster.py"


def test_ray_tune_shows_trials_through_the_callback_that_agcl_replaces():
    found("ray.tune.progress_reporter.TrialProgressCallback")


def test_ray_counts_the_files_of_a_job_by_the_functions_that_agcl_calls():
    packaging, user = "ray._private.runtime_env.packaging", "jobs/submit.py"
    taken = ("path", "excludes", "handler", "include_gitignore", "logger")
    check_takes(f"{packaging}._dir_travel", *taken, user=user)
    check_takes(f"{packaging}._get_excludes", "path", "excludes", user=user)
    constants = "ray._private.ray_constants"
    check_takes(f"{constants}.get_runtime_env_default_excludes", user=user)
    found(f"{constants}.RAY_RUNTIME_ENV_IGNORE_GITIGNORE")


def test_ray_counts_the_cpus_of_a_container_by_the_function_that_agcl_calls():
    path = "ray._private.utils.get_num_cpus"
    given = inspect.signature(found(path)).parameters
    user = "pipeline/execution/cluster.py"
    assert "override_docker_cpu_warning" in given, f"{path} takes {list(given)}; {user}"
    assert found(path)(override_docker_cpu_warning=True) >= 0
