"""The source files of a user's own function, whose content results depend on."""

import ast
import sysconfig
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

_INSTALLED = tuple(
    sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib")
)


def source_files(function: str) -> dict[str, Path]:
    """By module, the file of `package.module:function` and the files it imports.

    Without installed packages. Follows import statements only.
    """
    todo, files = [function.partition(":")[0]], {}
    while todo:
        module = todo.pop()
        file = _file(module)
        if file and module not in files:
            files[module] = file
            todo += _imported(module, file)
    return files


def _file(module: str) -> Path | None:
    if module.partition(".")[0] in ("agcl", "pipeline"):
        return None  # agcl's version is part of every fingerprint.
    try:
        spec = find_spec(module)
    except (ImportError, AttributeError, ValueError):
        return None  # A name of something inside a module.
    origin = spec.origin if spec and spec.has_location else None
    is_own = origin and origin.endswith(".py") and not origin.startswith(_INSTALLED)
    return Path(origin) if origin and is_own else None


def _imported(module: str, file: Path) -> Iterator[str]:
    """Names of the modules that a module may import, its own packages included."""
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    parents = package.split(".")
    yield from (".".join(parents[: i + 1]) for i in range(len(parents)) if package)
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            yield name
            yield from (f"{name}.{alias.name}" for alias in node.names)
