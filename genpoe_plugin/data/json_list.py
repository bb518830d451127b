"""Read long JSON lists item by item; DPR's result files are lists of gigabytes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from genpoe_plugin.errors import InputError
from genpoe_plugin.files import LONGEST_LINE, TOO_LONG

CHUNK = 1 << 16
# A value that ends, or an error, within this many characters of the end of the text read so far may be due to a token
# that is cut off there: a number, a literal, or an escape (at most 12 characters, an escaped surrogate pair).
MARGIN = 16

_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")


def read_json_list(file: TextIO, path: str | Path) -> Iterator[Any]:
    """The items of the first list in ``file``, decoded one by one.

    At most about the size of one item is read ahead. Text before the list is skipped; if there is any, text after the
    list is ignored as well.

    Args:
        file: the opened file.
        path: path of ``file``, for error messages.

    Raises:
        InputError: the list is not JSON, or the file ends within it; the message names file, line and column.
    """
    window = _Window(file, path)
    bare = (character := window.next_character()) == "["
    while character != "[":
        if not character:
            raise window.error("no list", window.at)
        window.at += 1
        character = window.next_character()
    window.at += 1
    if window.next_character() == "]":
        character = "]"
    while character != "]":
        yield window.value()
        character = window.next_character()
        if character not in (",", "]"):
            raise window.error("Expecting ',' delimiter", window.at)
        window.at += character == ","
    window.at += 1
    if bare and window.next_character():
        raise window.error("Extra data", window.at)


class _Window:
    """The part of a text file that is in memory; parsing continues at ``text[at]``."""

    def __init__(self, file: TextIO, path: str | Path) -> None:
        self.file, self.path = file, path
        self.text, self.at = "", 0
        self.line, self.column = 1, 1  # position in the file of the first character of text

    def extend(self) -> bool:
        """Drop parsed text and read more: at least as much as remains, so that an item is seldom decoded again."""
        if len(self.text) - self.at > LONGEST_LINE:
            raise InputError(f"{self.path}:{self.place(self.at)[0]}: {TOO_LONG}")
        more = self.file.read(max(CHUNK, len(self.text) - self.at))
        if more:
            self.line, self.column = self.place(self.at)
            self.text, self.at = self.text[self.at :] + more, 0
        return bool(more)

    def next_character(self) -> str:
        """Move to the next character that is not white space and return it; "" at the end of the file."""
        while True:
            space = _SPACE.match(self.text, self.at)
            assert space is not None
            self.at = space.end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.extend():
                return ""

    def value(self) -> Any:
        """Decode the value at the current position and move behind it."""
        self.next_character()
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                # For an unterminated string, the position is its beginning.
                cut = error.pos + MARGIN > len(self.text) or error.msg.startswith("Unterminated string")
                if not (cut and self.extend()):
                    raise self.error(error.msg, error.pos) from error
            except RecursionError as error:
                raise self.error("nested too deeply", self.at) from error
            except ValueError as error:
                raise self.error(str(error), self.at) from error  # a number of too many digits
            else:
                if end + MARGIN <= len(self.text) or not self.extend():
                    self.at = end
                    return value

    def place(self, position: int) -> tuple[int, int]:
        """Line and column, from 1, of a position in ``text``."""
        breaks = self.text.count("\n", 0, position)
        if breaks:
            return self.line + breaks, position - self.text.rindex("\n", 0, position)
        return self.line, self.column + position

    def error(self, message: str, position: int) -> InputError:
        line, column = self.place(position)
        return InputError(f"{self.path}:{line}: not JSON ({message}, column {column})")
