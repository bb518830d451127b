"""Watch what Python does while a file is read: nothing may be unpickled, started, or written outside a folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FORBIDDEN = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen")
WRITING = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.chmod", "shutil.rmtree")
"""Audit events (https://docs.python.org/3/library/audit_events.html); the paths are among their arguments."""

_root: str | None = None
_seen: list[str] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _root is None:
        return
    if event in FORBIDDEN:
        _seen.append(event)
    elif event in WRITING or (event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)):
        paths = [os.path.abspath(os.fsdecode(path)) for path in arguments[:2] if isinstance(path, str | bytes | Path)]
        paths = paths[:1] if event == "open" else paths
        _seen.extend(f"{event} {path}" for path in paths if not f"{path}/".startswith(f"{_root}/"))


def install() -> None:
    """Begin to listen. Audit hooks stay for the life of the process."""
    sys.addaudithook(_hook)


@contextmanager
def watching(root: Path) -> Iterator[list[str]]:
    """Yield a list of what is done inside the block that is forbidden, or written outside the folder ``root``."""
    global _root
    _seen.clear()
    _root = os.path.abspath(root)
    try:
        yield _seen
    finally:
        _root = None
