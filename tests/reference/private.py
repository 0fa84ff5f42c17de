"""Whether a library's private names still are what agcl relies on, before anything runs on them."""

import inspect
from importlib import import_module
from importlib.metadata import version


def found(path: str) -> object:
    """What a dotted path names; fails with a line that says which name is gone, and since when."""
    names = path.split(".")
    modules = [n for n in range(1, len(names)) if _is_module(".".join(names[:n]))]
    value = import_module(".".join(names[: modules[-1]]))
    for name in names[modules[-1] :]:
        assert hasattr(value, name), f"{_versioned(path)}: {path} is gone ({name} is not there)"
        value = getattr(value, name)
    return value


def check_takes(path: str, *parameters: str, user: str) -> None:
    """Check that a function can be called with these parameters and no other."""
    signature = inspect.signature(found(path))
    needed = [
        name
        for name, each in signature.parameters.items()
        if each.default is each.empty and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
    ]
    missing = [name for name in parameters if name not in signature.parameters]
    more = [name for name in needed if name not in parameters]
    differs = bool(missing or more)
    assert not differs, (
        f"{_versioned(path)}: {path} now is {signature}; {user} passes {', '.join(parameters)}"
    )


def _is_module(path: str) -> bool:
    try:
        import_module(path)
    except ModuleNotFoundError:
        return False
    return True


def _versioned(path: str) -> str:
    package = path.partition(".")[0]
    return f"{package} {version(package)}"
