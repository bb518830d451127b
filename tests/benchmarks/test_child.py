from __future__ import annotations

import os

import pytest

from benchmarks.child import run_child

HOLDS = """
import time
held = bytearray({size})
held[::4096] = b"x" * len(held[::4096])
time.sleep(0.3)
print("note")
print({line})
"""


def test_last_line_and_own_peak_memory() -> None:
    ours = bytearray(300_000_000)
    ours[::4096] = b"x" * len(ours[::4096])  # must not count in the peak of the child
    last, peak = run_child(["-c", HOLDS.format(size=150_000_000, line="'{\"ms\": 2.5}'")], os.environ)
    assert last == {"ms": 2.5}
    assert 150_000_000 < peak < 200_000_000


def test_the_child_has_only_the_given_environment() -> None:
    last, _ = run_child(["-c", "import os; print(os.environ.get('A'), os.environ.get('B'))"], {"A": "1"})
    assert last == "1 None"


def test_a_failure_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="exit status 3"):
        run_child(["-c", "raise SystemExit(3)"], os.environ)
