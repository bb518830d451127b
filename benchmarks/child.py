"""Measurements in a subprocess: with other load-time settings, or for peak memory from process start."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PAUSE = 0.05  # seconds between two readings of the memory


def run_child(arguments: Sequence[object], environment: Mapping[str, str]) -> tuple[Any, int]:
    """Run ``python ARGUMENTS`` and wait for it.

    Returns:
        The last line of its output (parsed if it is JSON), and its peak resident memory in bytes, including mapped
        files (Linux's ``VmHWM``). The peak is polled, because `wait4` also counts the memory of the forking process.

    Raises:
        RuntimeError: the command failed.
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
    except (OSError, ProcessLookupError):  # the process has ended
        return 0
    sizes = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")]
    return 1024 * int(sizes[0]) if sizes else 0
