"""Git-LFS pointers: small text files that stand where `git lfs pull` has not put the content."""

from pathlib import Path

from agcl.errors import InputError

_START = b"version https://git-lfs.github.com/spec/"


def check_pulled(path: Path) -> None:
    """Raise `InputError` if a file, or a file anywhere in a folder, is a Git-LFS pointer.

    A path that is missing is not reported.
    """
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    for file in files:
        if file.is_file():
            with file.open("rb") as stream:
                if stream.read(len(_START)) == _START:
                    raise InputError(f"{file} is a Git-LFS pointer; run `git lfs pull` there")
