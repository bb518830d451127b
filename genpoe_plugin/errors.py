"""The one error that users are meant to read."""


class InputError(ValueError):
    """What the user gave cannot be used.

    The message is a single line: what is wrong, where, and what would fix it. The command line prints it and exits
    with status 2; a library caller gets it as a ``ValueError``.
    """
