"""Claims: lock files with which one of many processes, on any number of machines, reserves a piece of work.

An existing claim is never created a second time, on local disks and on NFS (version 3 and later): a claim is created as
a hard link to a complete file, and linking is exclusive on both.

The owner of a claim locks the file. The kernel holds the lock as long as the process lives, so on the owner's machine
another process can take over the claim of a killed process at once, also after a reboot. Claims of other machines
(distinguished by host name) are never taken over: their owner, another process on that machine, or the user must remove
them. On file systems without locks, claims of this machine are not taken over either.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from genpoe_plugin.files import atomic_file
from genpoe_plugin.json_text import parse_json


@dataclass(frozen=True, slots=True)
class Claim:
    """A claim of this process, until it is released or the process ends.

    Attributes:
        path: path of the claim.
        file: the open, locked file.
    """

    path: Path
    file: BinaryIO

    def release(self) -> None:
        """Delete the claim, unless another process has replaced it."""
        if _is_at(self.path, self.file):
            self.path.unlink()
        self.file.close()


def claim(path: Path) -> Claim | None:
    """Create the claim ``path`` for this process, or take it over from a process that has ended.

    Returns:
        The claim; None if another process has it, or has just released it.
    """
    ended = None
    if path.exists() and (ended := _open_abandoned(path)) is None:
        return None
    with ended or nullcontext(), ExitStack() as opened:
        try:
            with atomic_file(path, replace=ended is not None) as temporary:
                file = opened.enter_context(temporary.open("wb"))
                file.write(json.dumps(_this_process()).encode())
                file.flush()
                _lock(file)
        except (FileExistsError, FileNotFoundError):  # another process was faster, or cleans up after all work
            return None
        opened.pop_all()
    return Claim(path, file)


def can_be_claimed(path: Path) -> bool:
    """Whether no living process seems to have the claim, so that it is worth trying to claim it."""
    if not path.exists():
        return True
    if (ended := _open_abandoned(path)) is None:
        return False
    ended.close()
    return True


def owner(path: Path) -> str:
    """The owner of a claim, as text."""
    try:
        record = _parse(path.read_bytes())
    except OSError:
        record = None
    return f"process {record['pid']} on {record['host']}" if record else "an unknown process"


def _open_abandoned(path: Path) -> BinaryIO | None:
    """Open the claim of a process that has ended; None if its owner may be alive.

    The file is locked while it is open, so that no other process takes over the claim as well.
    """
    with ExitStack() as opened:
        try:
            file = opened.enter_context(path.open("r+b"))
        except OSError:
            return None
        record, here = _parse(file.read()), _this_process()
        on_this_machine = record is not None and any(record[key] == here[key] for key in ("boot", "host"))
        if not (on_this_machine and _lock(file) and _is_at(path, file)):
            return None
        opened.pop_all()
    return file


def _lock(file: BinaryIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_at(path: Path, file: BinaryIO) -> bool:
    """Whether the open file is still at ``path``: another process may have replaced it."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _parse(content: bytes) -> dict[str, str | int] | None:
    try:
        record = parse_json(content.decode())
    except ValueError:
        return None
    return record if isinstance(record, dict) and record.keys() >= _this_process().keys() else None


def _this_process() -> dict[str, str | int]:
    host = socket.gethostname()
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # not Linux
        boot = host
    return {"host": host, "boot": boot, "pid": os.getpid()}
