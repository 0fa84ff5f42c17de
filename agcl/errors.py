"""The one exception for invalid user input."""


class InputError(ValueError):
    """Bad data, model or importance file. The message is one line that names the file or row."""
