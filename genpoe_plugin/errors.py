"""The exception for errors in user input."""


class InputError(ValueError):
    """Raised when an argument, a file or another input cannot be used.

    The message is one line that says what is wrong, where, and how to fix it. The ``genpoe`` command prints it and
    exits with status 2.
    """
