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
print({said})
"""


def test_what_it_says_and_its_own_peak() -> None:
    ours = bytearray(300_000_000)
    ours[::4096] = b"x" * len(ours[::4096])  # the memory of this process is none of the child's
    said, peak = run_child(["-c", HOLDS.format(size=150_000_000, said="'{\"ms\": 2.5}'")], os.environ)
    assert said == {"ms": 2.5}
    assert 150_000_000 < peak < 200_000_000


def test_the_environment_is_the_one_given() -> None:
    said, _ = run_child(["-c", "import os; print(os.environ.get('A'), os.environ.get('B'))"], {"A": "1"})
    assert said == "1 None"


def test_a_failure_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="exit status 3"):
        run_child(["-c", "raise SystemExit(3)"], os.environ)
