"""`agcl submit`: send the working directory and a command to a cluster as a Ray job."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import yaml

from agcl.errors import InputError

ENVIRONMENT = Path(__file__).parent / "runtime_env.yaml"
_MOST_BYTES = 100 * 2**20
"""What Ray's server accepts in a request; it answers 413 to more."""
_LEFT_OUT_BY_RAY = {".git", ".venv", "venv", "__pycache__"}


def main(arguments: argparse.Namespace, command: str) -> int:
    """Submit and follow the log; the exit code is that of `ray job submit`, 0 or 1."""
    if not arguments.command:
        raise InputError("submit: give a command, such as: agcl submit run facts")
    check_size(Path.cwd())
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    # Without the mode Ray sends no token, and ends in a traceback.
    mode = {"RAY_AUTH_MODE": "token"} if token.is_file() else {}
    ray = [str(Path(sys.executable).with_name("ray")), "job", "submit"]
    where = ["--address", arguments.address, "--working-dir", "."]
    job = ["--runtime-env", str(ENVIRONMENT), "--", "python", "-m", "jobs", *arguments.command]
    return subprocess.run([*ray, *where, *job], env=mode | os.environ, check=False).returncode


def check_size(folder: Path) -> None:
    """Raise `InputError` naming the largest entry if a folder is too large to be sent."""
    excluded = {name.strip("/") for name in yaml.safe_load(ENVIRONMENT.read_text())["excludes"]}
    sizes = {
        entry.name: _size(entry)
        for entry in folder.iterdir()
        if entry.name not in excluded | _LEFT_OUT_BY_RAY
    }
    if sum(sizes.values()) > _MOST_BYTES:
        largest = max(sizes, key=lambda name: sizes[name])
        raise InputError(
            f"submit: {folder} has {sum(sizes.values()) / 1e6:.0f} MB to send, of which {largest} "
            f"has {sizes[largest] / 1e6:.0f} MB; a job may have {_MOST_BYTES / 1e6:.0f} MB. Put "
            "data, models and storage where all nodes see them, or in models/, data/ or storage/, "
            "which are left out"
        )


def _size(entry: Path) -> int:
    files = entry.rglob("*") if entry.is_dir() else [entry]
    return sum(file.stat().st_size for file in files if file.is_file())
