"""Which commit of a model on the hub a command uses."""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from agcl.errors import InputError

from pipeline.config import hub, loading
from pipeline.config.config import Config
from pipeline.config.model import Model


def pinned(config: Config, begun: Iterable[Path]) -> Config:
    """The config with its model's revision resolved to a commit: `main` becomes `main@COMMIT`.

    `begun` are the stored configs of what this command would continue. If one of them uses the same
    model and branch, its commit is used and the hub is not asked: a branch that moved must not make
    an interrupted run start again, nor the methods of a comparison differ in their base model.
    Otherwise the hub decides, and without a network the cache. Unchanged without a model on the
    hub, or with a commit. Raises `InputError` if there is no such model or revision.
    """
    model = config.model
    asked, commit = hub.parts(model.revision)
    if not model.on_hub or commit:
        return config
    before = (_stored(config, file) for file in begun)
    known = (hub.parts(m.revision) for m in before if m and m.path == model.path)
    commit = next((hash_ for name, hash_ in known if name == asked and hash_), None)
    commit = commit or hub.resolve(model.path, asked)
    update = {"model": model.model_copy(update={"revision": f"{asked}@{commit}"})}
    return config.model_copy(update=update)


def _stored(config: Config, file: Path) -> Model | None:
    """The model of a stored config; None if there is no such file, or one that cannot be read."""
    config.storage.refresh(file)
    with suppress(InputError):
        return loading.load(file).model
    return None
