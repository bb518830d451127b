"""Running `genpoe` commands as subprocesses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from genpoe_plugin.errors import InputError


def run_genpoe(*words: str | Path) -> None:
    """Run ``genpoe WORDS``, with its output in the terminal.

    Raises:
        InputError: the command failed.
    """
    command = [str(word) for word in words]
    done = subprocess.run([sys.executable, "-m", "train_cli", *command], stdin=subprocess.DEVNULL)
    if done.returncode:
        raise InputError(f"genpoe {' '.join(command)}: stopped with status {done.returncode}")


def whole_name(name: str) -> str:
    """The absolute path of a directory; a hub name unchanged.

    Runs are recognised by their command, so the command must not depend on the working directory.
    """
    return str(Path(name).resolve()) if Path(name).is_dir() else name
