"""The one exception for what the user gave us."""


class InputError(ValueError):
    """Bad data, model or importance file. The message is one line that names the file or row."""
