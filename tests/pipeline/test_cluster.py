"""cluster.yaml is what Ray's autoscaler accepts."""

from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]


def test_cluster_yaml_is_valid_for_ray() -> None:
    util = pytest.importorskip("ray.autoscaler._private.util")
    pytest.importorskip("jsonschema")
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    util.validate_config(util.prepare_config(config))


def test_cluster_yaml_pins_the_tested_versions() -> None:
    text = (ROOT / "cluster.yaml").read_text()
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines()[1:]
    )
    for package in ("torch", "transformers", "datasets", "peft", "mlflow", "pyarrow"):
        assert f"{package}=={pins[package]}" in text
    assert f"tune,data]=={pins['ray']}" in text
