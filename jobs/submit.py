"""`agcl submit`: send the working directory and a command to a cluster as a Ray job."""

import argparse
import logging
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import yaml

from agcl.errors import InputError
from jobs.cli import INTERRUPTED

ENVIRONMENT = Path(__file__).parent / "runtime_env.yaml"
_MOST_BYTES = 100 * 2**20
"""What Ray's server accepts in a request; it answers 413 to more."""


def main(arguments: argparse.Namespace, command: str) -> int:
    """Submit and follow the log; the exit code is that of `ray job submit`, 0 or 1.

    130 if interrupted, which ends only the log.
    """
    if not arguments.command:
        raise InputError("submit: give a command, such as: agcl submit run facts")
    check_size(Path.cwd())
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    # Without the mode Ray sends no token, and ends in a traceback.
    mode = {"RAY_AUTH_MODE": "token"} if token.is_file() else {}
    ray = [str(Path(sys.executable).with_name("ray")), "job", "submit"]
    where = ["--address", arguments.address, "--working-dir", "."]
    job = ["--runtime-env", str(ENVIRONMENT), "--", "python", "-m", "jobs", *arguments.command]
    try:
        return subprocess.run([*ray, *where, *job], env=mode | os.environ, check=False).returncode
    except KeyboardInterrupt:
        print(
            "agcl: interrupted; a submitted job keeps running: ray job logs --follow ID shows its "
            "log, ray job stop ID stops it",
            file=sys.stderr,
        )
        return INTERRUPTED


def check_size(folder: Path) -> None:
    """Raise `InputError` naming the largest entry if a folder is too large to be sent."""
    sizes = _sizes(folder)
    if sizes.total() > _MOST_BYTES:
        ((largest, size),) = sizes.most_common(1)
        raise InputError(
            f"submit: {folder} has {sizes.total() / 1e6:.0f} MB to send, of which {largest} "
            f"has {size / 1e6:.0f} MB; a job may have {_MOST_BYTES / 1e6:.0f} MB. Put "
            "data, models and storage where all nodes see them, or in models/, data/ or storage/, "
            "which are left out, as is what .gitignore or .rayignore names"
        )


def _sizes(folder: Path) -> Counter[str]:
    """Bytes by entry of the files that Ray would send: not those that some `.gitignore` names."""
    from ray._private import ray_constants
    from ray._private.runtime_env import packaging

    sizes: Counter[str] = Counter()

    def add(path: Path) -> None:
        if path.is_file():
            sizes[path.relative_to(folder).parts[0]] += path.stat().st_size

    excludes = yaml.safe_load(ENVIRONMENT.read_text())["excludes"]
    excludes += ray_constants.get_runtime_env_default_excludes()
    packaging._dir_travel(
        folder,
        [packaging._get_excludes(folder, excludes)],
        add,
        include_gitignore=os.environ.get(ray_constants.RAY_RUNTIME_ENV_IGNORE_GITIGNORE) != "1",
        logger=logging.getLogger(__name__),
    )
    return sizes
