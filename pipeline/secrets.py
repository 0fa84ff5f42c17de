"""Credentials: used where they are given, never written down."""

import os
import re

MASK = "***"
# What stands before the host, also with a `/` or an `@` in the password, and what follows a `?`.
_BEFORE_HOST = re.compile(r"(?<=://)(?:[^\s/@:]*:\S*|[^\s/@]+)@")
_IN_QUERY = re.compile(r"(?i)(?<=[?&;])(\w*(?:passw|pwd|token|secret|key)\w*=)[^&;\s]+")
_NAME = re.compile(r"(?i)token|passw|secret|credential|(?:^|_)key|api_?key")
_SHORTEST = 6
"""A secret of the environment shorter than this could be any word."""


def has_credentials(uri: str) -> bool:
    """Whether a URI contains a user name, a password or another secret."""
    return bool(_BEFORE_HOST.search(uri) or _IN_QUERY.search(uri))


def masked(text: str) -> str:
    """The text with `***` for credentials in addresses and for secrets of the environment.

    Those are the values of variables named like one: `HF_TOKEN`, `AWS_SECRET_ACCESS_KEY`.
    """
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and _NAME.search(name) and not name.endswith(("_PATH", "_FILE")):
            text = text.replace(value, MASK)
    return _IN_QUERY.sub(rf"\1{MASK}", _BEFORE_HOST.sub(f"{MASK}@", text))
