"""agcl as a library: it needs neither Ray nor what else only the pipeline needs."""

import subprocess
import sys
import tomllib
from importlib.resources import files
from pathlib import Path

ROOT = Path(__file__).parents[2]
CODE = """
import pkgutil, importlib, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"blocked: {{name}}")

sys.meta_path.insert(0, Blocked())
import agcl
for module in pkgutil.walk_packages(agcl.__path__, "agcl."):
    if not module.name.endswith("kernels.gpu"):
        importlib.import_module(module.name)
"""
OF_TORCH_OR_TRANSFORMERS = {"jinja2", "pyyaml", "psutil"}


def test_every_module_imports_without_the_pipelines_packages():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    names = {line.partition("[")[0].partition(">")[0] for line in extras["pipeline"]}
    assert {"ray", "mlflow", "pydantic"} <= names
    code = CODE.format(blocked=names - OF_TORCH_OR_TRANSFORMERS)
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_types_are_published():
    assert files("agcl").joinpath("py.typed").is_file()
