"""The one exception for invalid user input, and errors in one line."""


class InputError(ValueError):
    """Bad data, model or importance file. The message is one line that names the file or row."""


def one_line(error: object, most: int | None = None) -> str:
    """The text of an error, or a text, without line breaks, at most `most` characters."""
    return " ".join(str(error).split())[:most]
