"""End an interrupted process at once.

Before it ends, Python takes apart all modules. With large libraries that takes a second, and several on a busy machine.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
from contextlib import suppress
from typing import NoReturn

STATUS = 130
"""Exit status of an interrupted command, as shells have it."""


def exit_at_once() -> NoReturn:
    """End the process with `STATUS`. Functions registered with `atexit` run, everything else is left to the system."""
    _finish()
    os._exit(STATUS)


def end_by_signal() -> None:
    """Like `exit_at_once`, but by the signal itself, as Python ends after an uncaught Ctrl-C."""
    _finish()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.raise_signal(signal.SIGINT)


def _finish() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not stop the functions
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # it is closed
            stream.flush()
