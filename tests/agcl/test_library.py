"""agcl as a library: it needs neither Ray nor what else only the pipeline needs."""

import ast
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def imported(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").partition(".")[0]


def test_no_module_imports_what_only_the_pipeline_installs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra = project["optional-dependencies"]["pipeline"]
    names = {line.partition("[")[0].partition(">")[0] for line in extra}
    assert {"ray", "mlflow", "pydantic"} <= names
    found = {
        (file.name, name)
        for file in (ROOT / "agcl").rglob("*.py")
        for name in names.intersection(imported(file))
    }
    assert {name for _, name in found} <= {"datasets"}, found  # Where a hub dataset is opened.


def test_types_are_published():
    assert (ROOT / "agcl" / "py.typed").is_file()
