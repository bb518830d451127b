"""Interrupted processes end with their status, after functions of atexit and before Python takes modules apart."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

SLOW = """
import atexit, os, sys, types
class Slow:
    def __del__(self):
        os.write(1, b"taken apart\\n")
kept = types.ModuleType("kept")
kept.slow, sys.modules["kept"] = Slow(), kept
atexit.register(print, "at exit")
"""
COMMAND = """
import click
from train_cli import main as module
@module.main.command("work")
def work():
    print("works")
    if {status} == 130:
        raise KeyboardInterrupt("interrupted; saved")
sys.argv = ["genpoe", "work"]
module.run()
"""
LM_EVAL = """
sys.argv = ["lm_eval"]
sys.modules["genpoe_plugin.lm.hf"] = types.ModuleType("hf")
from genpoe_plugin.registration import errors_in_one_line
errors_in_one_line()
print("works")
{end}
"""


@pytest.mark.parametrize(
    ("code", "status", "error", "quick"),
    [
        (COMMAND.format(status=130), 130, "interrupted; saved\n", True),
        (COMMAND.format(status=0), 0, "", False),
        (LM_EVAL.format(end="raise KeyboardInterrupt"), -signal.SIGINT, "interrupted\n", True),
        (LM_EVAL.format(end=""), 0, "", False),
    ],
    ids=["genpoe-interrupted", "genpoe", "lm_eval-interrupted", "lm_eval"],
)
def test_only_interrupted_processes_are_not_taken_apart(code: str, status: int, error: str, quick: bool) -> None:
    done = subprocess.run([sys.executable, "-c", SLOW + code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (status, error)
    assert done.stdout == "works\nat exit\n" + ("" if quick else "taken apart\n")


def test_a_second_ctrl_c_stops_functions_of_atexit_that_hang() -> None:
    hangs = "import time\natexit.register(lambda: (os.kill(os.getpid(), 2), time.sleep(60)))\n"
    done = subprocess.run(
        [sys.executable, "-c", SLOW + hangs + COMMAND.format(status=130)], capture_output=True, text=True, timeout=50
    )
    assert (done.returncode, done.stderr) == (130, "interrupted; saved\n")


@pytest.mark.parametrize(("code", "status"), [(COMMAND, 130), (LM_EVAL, -signal.SIGINT)], ids=["genpoe", "lm_eval"])
def test_with_vllm_python_ends_the_process(code: str, status: int) -> None:
    """Its other processes end when this one is taken apart."""
    code = (
        SLOW
        + 'sys.modules["vllm"] = types.ModuleType("vllm")\n'
        + code.format(status=130, end="raise KeyboardInterrupt")
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == status and done.stdout == "works\nat exit\ntaken apart\n"
