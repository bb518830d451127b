"""Locks of outputs: two processes never write the same one."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from genpoe_plugin.errors import InputError
from genpoe_plugin.files import atomic_directory, atomic_file, only_writer


def in_child(work) -> int:
    """The pid of a forked process that does the work."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return child


def hold(target: Path) -> int:
    """The pid of a process that writes ``target`` until it is killed."""

    def work() -> None:
        with only_writer(target):
            (target.parent / "held").touch()
            time.sleep(60)

    child = in_child(work)
    while not (target.parent / "held").exists():
        time.sleep(0.01)
    return child


def end(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def end_when(held: Path, child: int) -> None:
    """Kill a child once it has made a file."""
    while not held.exists():
        time.sleep(0.01)
    end(child)


def test_one_process_writes_and_a_killed_one_needs_no_cleaning(tmp_path: Path) -> None:
    target = tmp_path / "new folder" / "out"
    child = hold(target)
    try:
        message = r"out: another process writes it; wait until it has ended, or give another output$"
        with pytest.raises(InputError, match=message), only_writer(target):
            pass
        with only_writer(tmp_path / "another"):
            pass
    finally:
        end(child)
    with only_writer(target):
        pass
    assert {path.name for path in target.parent.iterdir()} == {"held"}


def test_waiting_for_the_other_and_for_what_it_has_started(tmp_path: Path) -> None:
    """The lock is inherited: a run that a killed process has started still writes."""
    target, said = tmp_path / "out", []

    def work() -> None:
        with only_writer(target):
            in_child(lambda: (time.sleep(0.5), target.write_text("by its child")))
            (tmp_path / "held").touch()
            time.sleep(60)

    end_when(tmp_path / "held", in_child(work))
    assert not target.exists()
    with only_writer(target, wait=lambda: said.append("waiting")):
        assert said == ["waiting"] and target.read_text() == "by its child"


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = r"out: cannot be written \(.*\); give another output$"
    with pytest.raises(InputError, match=message), only_writer(tmp_path / "file" / "out"):
        pass


def test_temporaries_of_killed_processes_are_deleted_and_nothing_else(tmp_path: Path) -> None:
    def work() -> None:
        target = tmp_path / "out"
        with only_writer(target):
            target.mkdir()
            with atomic_file(target / "inner"), atomic_directory(target / "more"), atomic_directory(target):
                (tmp_path / "held").touch()
                time.sleep(60)

    end_when(tmp_path / "held", in_child(work))
    with atomic_file(tmp_path / "out.json") as other:  # another output, whose name begins with this one's
        (tmp_path / ".out.settings").touch()
        assert len([path for path in tmp_path.rglob(".*") if path != other]) == 5
        with only_writer(tmp_path / "out"):
            pass
        assert {path for path in tmp_path.rglob(".*")} == {other, tmp_path / ".out.settings"}
