"""Models on the Hugging Face hub: from `org/name` and a revision to a folder in the hub's cache.

The cache is Hugging Face's own (`HF_HOME`, `HF_HUB_CACHE`), as are `HF_TOKEN`, `HF_HUB_OFFLINE` and
`HF_ENDPOINT`. `huggingface_hub` is imported where it is needed: a config is read without it.
"""

import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from agcl.errors import InputError

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_MAIN = "main"
_FETCHED = (
    *("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json"),
    *("tokenizer*.json", "*.model", "vocab.*", "merges.txt", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.json", "*.jinja"),
)
_LEFT_OUT = ("*/*", "consolidated*", "*.py", "*.bin")
"""Other formats of the same weights (Llama's `original/`, Mistral's `consolidated.safetensors`)."""


def is_id(path: str) -> bool:
    """Whether a text has the form of a model on the hub, `org/name`."""
    return bool(_ID.fullmatch(path))


def parts(revision: str | None) -> tuple[str, str | None]:
    """What was asked for, and the commit hash if the revision has it: `main@HASH`, or a hash."""
    asked, _, commit = (revision or _MAIN).rpartition("@")
    if not _COMMIT.fullmatch(commit):
        return revision or _MAIN, None
    return asked or commit, commit


def folder_of(model: str, commit: str) -> Path:
    """Where the hub's cache on this machine keeps a commit, whether it is there or not."""
    from huggingface_hub import constants

    name = "--".join(("models", *model.split("/")))
    return Path(constants.HF_HUB_CACHE).expanduser().resolve() / name / "snapshots" / commit


def resolve(model: str, revision: str) -> str:
    """The commit hash of a branch, tag or commit, from the hub or, without a network, the cache.

    Raises `InputError`, one line that says what to do, if there is none or it may not be read.
    """
    from huggingface_hub import HfApi

    with _explained(model, revision):
        return HfApi().resolve_revision(model, revision=revision).resolved


def fetch(model: str, commit: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """Download what is missing of a commit into the cache and return its folder.

    Only safetensors, configs and tokenizer files: no pickle, no Python. Makes no request if all
    is there. `revision` is the name for the commit in messages. With `weights` false, the weights
    are left on the hub unless some are here already. Raises `InputError`, one line that says what
    to do.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        disable_progress_bars()
    with _explained(model, revision or commit):
        weights = weights or any(folder_of(model, commit).glob("*.safetensors*"))
        allowed = [name for name in _FETCHED if weights or "safetensors" not in name]
        ignored = [*_LEFT_OUT]
        folder = Path(
            snapshot_download(
                model, revision=commit, allow_patterns=allowed, ignore_patterns=ignored
            )
        )
    if weights and not any(folder.glob("*.safetensors")):
        raise InputError(
            f"model.path: {model} has no safetensors at {revision or commit}, and agcl opens no "
            "other weights; name a model.revision that has them (such as refs/pr/1), or convert it "
            "to a folder with save_pretrained"
        )
    return folder


def on_this_machine(path: Path, *, weights: bool = True) -> Path:
    """A snapshot in another machine's cache, found or downloaded in this one's.

    A snapshot in this machine's cache is completed: an interrupted download leaves a part of it.
    Other paths are returned unchanged. Raises `InputError` as `fetch` does.
    """
    named = name_of(path)
    if not named or (path.exists() and path != folder_of(*named)):
        return path
    try:
        return fetch(*named, weights=weights)
    except InputError:
        if path.exists():  # Offline: use what is there.
            return path
        raise


def name_of(path: Path) -> tuple[str, str] | None:
    """The id and the commit of a snapshot's folder in any machine's cache; None for other paths.

    The hub's cache names folders `models--org--name/snapshots/COMMIT`; ids have no double hyphen.
    """
    *_, name, snapshots, commit = ("", "", *path.parts)
    if snapshots != "snapshots" or not _COMMIT.fullmatch(commit):
        return None
    return "/".join(name.split("--")[1:]), commit


@contextmanager
def _explained(model: str, revision: str) -> Iterator[None]:
    """Turn what `huggingface_hub` raises into an `InputError` that names the key and the remedy.

    The message contains neither the hub's own text, which has addresses and request ids, nor a
    token.
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RevisionResolutionError

    try:
        yield
    except Exception as error:  # Its transport's errors have no common type.
        # A full disk is an OSError with a number, and no matter of the hub.
        of_hub = isinstance(error, OSError) and error.errno is None
        of_hub |= isinstance(error, HfHubHTTPError | HFValidationError | RevisionResolutionError)
        if not of_hub and not type(error).__module__.startswith("httpx"):
            raise
        raise InputError(_remedy(error, model, revision)) from None


def _remedy(error: BaseException, model: str, revision: str) -> str:
    from huggingface_hub import constants, errors, get_token

    cause = error
    while not isinstance(cause, errors.HfHubHTTPError) and cause.__cause__ is not None:
        cause = cause.__cause__
    status = cause.response.status_code if isinstance(cause, errors.HfHubHTTPError) else 0
    hub = constants.ENDPOINT
    who = "with the token in HF_TOKEN" if get_token() else "without HF_TOKEN"
    if isinstance(error, errors.HFValidationError):
        return f"model.path: there is no folder {model}, and no model on the hub can be called that"
    if isinstance(cause, errors.RevisionNotFoundError):
        return f"model.revision: {model} has no branch, tag or commit {revision} on {hub}"
    if isinstance(cause, errors.GatedRepoError):
        return (
            f"model.path: {model} is gated and does not open {who}; accept its conditions at "
            f"{hub}/{model} and set HF_TOKEN to a token of that account"
        )
    # Without a token, the hub does not tell a model that it hides from one that is not there.
    if isinstance(cause, errors.RepositoryNotFoundError) or (status == 401 and not get_token()):
        return (
            f"model.path: there is no folder {model}, and {hub} shows no model {model} {who}; "
            "check the name, and set HF_TOKEN if the model is private"
        )
    if status in (401, 403):
        return (
            f"model.path: {hub} refuses {model} {who} ({status}); set HF_TOKEN to a token that may "
            "read it"
        )
    cache = constants.HF_HUB_CACHE
    where = (
        f"there is no folder {model}, and {model} at {revision} is not, or not whole, in {cache}"
    )
    if constants.is_offline_mode():
        return f"model.path: {where}, and HF_HUB_OFFLINE is set; run once with HF_HUB_OFFLINE=0"
    reason = f"answers {status}" if status else f"cannot be reached ({type(cause).__name__})"
    return f"model.path: {where}, and {hub} {reason}; check the network (HF_ENDPOINT, HTTPS_PROXY)"
