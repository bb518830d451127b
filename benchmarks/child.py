"""Measurements in a process of their own: other load-time settings, or memory from nothing."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PAUSE = 0.05  # seconds between two looks at the memory


def run_child(arguments: Sequence[object], environment: Mapping[str, str]) -> tuple[Any, int]:
    """Run ``python ARGUMENTS`` and wait for it.

    Returns:
        The last line of its output, parsed as JSON where it is that, else as it is; and the most bytes that were in
        its memory at one time, files that it maps included (``VmHWM`` of Linux). That is asked for all along, since
        what `wait4` says afterwards has the memory of the process that forked as well.
    """
    with tempfile.TemporaryFile("w+") as output:
        child = subprocess.Popen([sys.executable, *map(str, arguments)], stdout=output, env=dict(environment))
        peak = 0
        try:
            while child.poll() is None:
                peak = max(peak, _peak_so_far(child.pid))
                time.sleep(PAUSE)
        finally:
            child.kill()
        output.seek(0)
        lines = output.read().splitlines()
    if child.returncode:
        raise RuntimeError(f"{' '.join(map(str, arguments))}: exit status {child.returncode}")
    last = lines[-1] if lines else ""
    try:
        return json.loads(last), peak
    except json.JSONDecodeError:
        return last, peak


def _peak_so_far(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (OSError, ProcessLookupError):  # it has just ended
        return 0
    sizes = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")]
    return 1024 * int(sizes[0]) if sizes else 0
