"""The exception for errors in user input, and text of others in messages."""

import unicodedata

LONGEST = 2000  # characters of a message


class InputError(ValueError):
    """Raised when an argument, a file or another input cannot be used.

    The message is one line that says what is wrong, where, and how to fix it. The ``genpoe`` command prints it and
    exits with status 2. Names and values in it may come from files of others, so characters that cannot be printed,
    such as line breaks and a terminal's control characters, are escaped, and a long message loses its middle.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_shortened(printable(_shortened(message))))


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"


def printable(text: str) -> str:
    """The text with escapes for characters that cannot be printed, such as line breaks and a terminal's control
    characters."""
    return text if text.isprintable() else "".join(map(_escaped, text))


def harmless(text: str) -> str:
    """The text with escapes for control characters and for marks that reverse or hide text, for a terminal.

    Other characters stay, also spaces of any kind and those that join letters or emoji.
    """
    return text if text.isprintable() else "".join(one if _is_harmless(one) else _escaped(one) for one in text)


def _is_harmless(character: str) -> bool:
    category = unicodedata.category(character)
    return character in "\u200c\u200d" or not (category[0] == "C" or category in ("Zl", "Zp"))


def _escaped(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode()
