"""Claims: files by which one of many processes, on any number of machines, makes a piece of work its own.

What is guaranteed, on a local disk and on NFS alike (version 3 and later): a claim that is there is never made a second
time, because it comes into being as a hard link to a file that is whole already, and linking is exclusive on both.

Whether its owner is still alive is known on the owner's machine, by the lock that the kernel holds on the file for as
long as the process lives; so what a killed process left behind is taken over there at once, after a reboot too. Nothing
is concluded about other machines, which are told apart by host name: their claims stay until their owner, another
process of that machine, or the user removes them. Where a file system has no locks, they stay on this machine too.
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


@dataclass(frozen=True, slots=True)
class Claim:
    """A claim of this process, until it is released or the process ends."""

    path: Path
    file: BinaryIO

    def release(self) -> None:
        if _is_at(self.path, self.file):
            self.path.unlink()
        self.file.close()


def claim(path: Path) -> Claim | None:
    """Make the file ``path``, which names this process, or take it over from one that has ended; None if another has
    it, or had it just now."""
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
        except (FileExistsError, FileNotFoundError):  # another was faster, or tidies up, for all work is done
            return None
        opened.pop_all()
    return Claim(path, file)


def can_be_claimed(path: Path) -> bool:
    """Whether nobody has the claim, so that it is worth trying."""
    if not path.exists():
        return True
    if (ended := _open_abandoned(path)) is None:
        return False
    ended.close()
    return True


def owner(path: Path) -> str:
    """Who has a claim, for people."""
    try:
        found = _parse(path.read_bytes())
    except OSError:
        found = None
    return f"process {found['pid']} on {found['host']}" if found else "an unknown process"


def _open_abandoned(path: Path) -> BinaryIO | None:
    """The file of a claim whose owner has ended, locked while it is open, so that no other takes it over as well."""
    with ExitStack() as opened:
        try:
            file = opened.enter_context(path.open("r+b"))
        except OSError:
            return None
        found, here = _parse(file.read()), _this_process()
        on_this_machine = found is not None and any(found[key] == here[key] for key in ("boot", "host"))
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
    """Whether the open file still has this name: another may have been made meanwhile."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _parse(content: bytes) -> dict[str, str | int] | None:
    try:
        found = json.loads(content)
    except ValueError:
        return None
    return found if isinstance(found, dict) and found.keys() >= _this_process().keys() else None


def _this_process() -> dict[str, str | int]:
    host = socket.gethostname()
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # not Linux
        boot = host
    return {"host": host, "boot": boot, "pid": os.getpid()}
