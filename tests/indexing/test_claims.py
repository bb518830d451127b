from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest

from genpoe_plugin.indexing import claims
from genpoe_plugin.indexing.claims import can_be_claimed, claim, owner


def in_child(work: Callable[[], object]) -> int:
    """The exit status of a forked process in which ``work`` returned (0), raised (1), or was killed (negative)."""
    if (child := os.fork()) == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def claim_and_die(path: Path) -> None:
    def work() -> None:
        assert claim(path) is not None
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(work) == -signal.SIGKILL


def test_one_has_it_until_it_is_released(tmp_path: Path) -> None:
    path = tmp_path / "work.claim"
    assert can_be_claimed(path)
    mine = claim(path)
    assert mine is not None and not can_be_claimed(path) and claim(path) is None
    assert owner(path) == f"process {os.getpid()} on {socket.gethostname()}"

    def refused() -> None:
        assert claim(path) is None and not can_be_claimed(path)

    assert in_child(refused) == 0
    assert [file.name for file in tmp_path.iterdir()] == ["work.claim"]
    mine.release()
    assert not path.exists() and can_be_claimed(path)


def test_of_many_one_gets_it(tmp_path: Path) -> None:
    """Both where nothing is there, and where an ended process left its claim."""
    for name in ("new", "left"):
        path = tmp_path / name
        if name == "left":
            claim_and_die(path)
        answers, answer = os.pipe()
        begin, gate = os.pipe()
        end, hold = os.pipe()
        children = []
        for _ in range(4):
            if (child := os.fork()) == 0:
                os.close(gate)
                os.close(hold)
                os.read(begin, 1)  # until the parent closes its end
                mine = claim(path)
                os.write(answer, b"n" if mine is None else b"y")
                os.read(end, 1)
                os._exit(0)
            children.append(child)
        os.close(gate)
        got = b"".join(os.read(answers, 1) for _ in children)
        os.close(hold)
        for child in children:
            os.waitpid(child, 0)
        for descriptor in (answers, answer, begin, end):
            os.close(descriptor)
        assert sorted(got) == sorted(b"nnny")


def test_what_a_killed_process_left_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "work.claim"
    claim_and_die(path)
    assert path.exists() and can_be_claimed(path)
    mine = claim(path)
    assert mine is not None and f"process {os.getpid()} " in owner(path) and claim(path) is None
    mine.release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "taken"),
    [({"boot": "earlier"}, True), ({"host": "renamed"}, True), ({"host": "far", "boot": "theirs"}, False)],
    ids=["rebooted", "another container", "another machine"],
)
def test_only_claims_of_this_machine_are_taken_over(tmp_path: Path, change: dict[str, str], taken: bool) -> None:
    path = tmp_path / "work.claim"
    claim_and_die(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert can_be_claimed(path) == taken
    assert (claim(path) is not None) == taken


@pytest.mark.parametrize("content", ["", "{}", "[1]", "\0\0"])
def test_a_claim_that_says_nothing_is_left_alone(tmp_path: Path, content: str) -> None:
    (tmp_path / "work.claim").write_text(content)
    assert not can_be_claimed(tmp_path / "work.claim") and claim(tmp_path / "work.claim") is None
    assert owner(tmp_path / "work.claim") == "an unknown process"


def test_without_locks_nobody_is_taken_for_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    mine = claim(tmp_path / "work.claim")
    assert mine is not None and not can_be_claimed(tmp_path / "work.claim")
    mine.release()
    assert can_be_claimed(tmp_path / "work.claim")


def test_a_released_claim_is_nobody_elses(tmp_path: Path) -> None:
    """The user deleted a claim, and another process made its own: releasing the first leaves that."""
    path = tmp_path / "work.claim"
    first = claim(path)
    path.unlink()
    second = claim(path)
    assert first is not None and second is not None
    first.release()
    assert path.exists() and not can_be_claimed(path)
    second.release()
    assert not path.exists()


def test_of_two_at_the_same_moment_one_gets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process makes its claim after the first has seen that there is none."""
    path, this_process = tmp_path / "work.claim", claims._this_process

    def too_late() -> dict[str, str | int]:
        path.write_text("the other's")
        return this_process()

    monkeypatch.setattr(claims, "_this_process", too_late)
    assert claim(path) is None and path.read_text() == "the other's"
    assert [file.name for file in tmp_path.iterdir()] == ["work.claim"]


def test_of_two_that_take_over_one_gets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process takes a claim over after the first has opened its file."""
    path, lock = tmp_path / "work.claim", claims._lock
    claim_and_die(path)

    def too_late(file: BinaryIO) -> bool:
        (tmp_path / "new").write_text("the other's")
        (tmp_path / "new").replace(path)
        return lock(file)

    monkeypatch.setattr(claims, "_lock", too_late)
    assert claim(path) is None and path.read_text() == "the other's"
