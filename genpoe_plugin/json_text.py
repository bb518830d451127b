"""Parse JSON that others may have written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(text: str) -> Any:
    """Parse JSON; of a name that an object has twice, the last value counts.

    Raises:
        ValueError: it is not JSON, is nested too deeply, or has a lone surrogate, which no file can be written with.
    """
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if _SURROGATE.search(text):
        json.dumps(value, ensure_ascii=False).encode()
    return value


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        ValueError: it is not JSON in UTF-8; see `parse_json`.
        OSError: it cannot be read.
    """
    return parse_json(path.read_text(encoding="utf-8"))
