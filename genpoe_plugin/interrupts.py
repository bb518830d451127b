"""End an interrupted process at once.

Before it ends, Python takes apart all modules. With large libraries that takes a second, and several on a busy machine.
A process with vLLM ends in Python's way, because vLLM's other processes end when this one is taken apart.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
from contextlib import suppress

STATUS = 130
"""Exit status of an interrupted command, as shells have it."""


def exit_at_once() -> None:
    """End the process with `STATUS`, unless vLLM is loaded.

    Functions registered with `atexit` run, everything else is left to the system. Ctrl-C stops these functions.
    """
    if "vllm" not in sys.modules:
        _finish()
        os._exit(STATUS)


def end_by_signal() -> None:
    """Like `exit_at_once`, but by the signal itself, as Python ends after an uncaught Ctrl-C."""
    if "vllm" not in sys.modules:
        _finish()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)


def _finish() -> None:
    signal.signal(signal.SIGINT, lambda *_: os._exit(STATUS))
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # it is closed
            stream.flush()
