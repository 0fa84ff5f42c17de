"""Errors that a command ends with in one line and exit code 1."""


class RayFailed(RuntimeError):
    """Ray did not start, or could not be joined."""
