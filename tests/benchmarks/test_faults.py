"""Commands are killed and interrupted at random moments; `python -m benchmarks faults` does so with all of them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks import faults
from benchmarks.fault_commands import COMMANDS, Command, left_behind
from genpoe_plugin.files import atomic_file

CHEAP = ("index encode", "index build, BM25", "rerank")
"""Those that take less than a second."""


def values(commands: Sequence[Command], kills: int, interrupts: int, folder: Path) -> dict[str, float]:
    with faults.working_in(folder):
        rows = faults.measure(commands, kills, interrupts)
    return {row.name.removeprefix("faults."): row.value for row in rows}


def test_nothing_is_lost_and_nothing_differs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    commands = [command for command in COMMANDS if command.name in CHEAP]
    assert len(commands) == len(CHEAP)
    found = values(commands, 4, 2, tmp_path)
    assert (found["kills"], found["interrupts"]) == (4, 2)
    # Not how long an interrupt took: that depends on what else runs here.
    assert (found["lost"], found["different"]) == (0, 0), capfd.readouterr().err


@dataclass(frozen=True)
class Scripted(Command):
    """A command that a test writes."""

    work: Callable[[], None] = lambda: None

    def run(self) -> None:
        self.work()


def appends() -> None:
    with open("out/file", "a") as file:
        for _ in range(20):
            file.write("line\n")
            file.flush()
            time.sleep(0.02)


def refuses_what_is_there() -> None:
    Path("out/file").touch(exist_ok=False)
    time.sleep(0.4)


def replaces() -> None:
    time.sleep(0.4)
    with atomic_file("out/file") as temporary:
        temporary.write_text("all")


@pytest.mark.parametrize(
    ("work", "kills", "interrupts", "bad"),
    [
        (appends, 3, 0, {"different"}),
        (refuses_what_is_there, 3, 0, {"lost"}),
        (replaces, 3, 0, set()),
        (appends, 0, 2, {"wrong_interrupts"}),  # a traceback
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_faulty_commands_are_found(work, kills: int, interrupts: int, bad, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(faults, "make_world", lambda folder: None)
    found = values([Scripted("scripted", (), work)], kills, interrupts, tmp_path)
    assert (found["kills"], found["interrupts"]) == (kills, interrupts)
    assert {name for name in ("lost", "different", "wrong_interrupts") if found[name]} == bad


def test_what_is_left_behind_is_compared_without_dates(tmp_path: Path) -> None:
    for name, date, score in (("a", "2026-01-01T00-00-00.1", 1), ("b", "2026-01-02T00-00-00.2", 1), ("c", "", 2)):
        folder = tmp_path / name / "results"
        folder.mkdir(parents=True)
        report = {"results": {"em": score}, "configs": {"f": f"<function f at 0x{hash(date):x}>"}, "date": date}
        report |= {"versions": {}, "n-shot": {}, "n-samples": {}}
        date = date or "2026-01-01T00-00-00.1"
        (folder / f"results_{date}.json").write_text(json.dumps(report).replace("0x-", "0x"))
        (folder / f"samples_t_{date}.jsonl").write_text("{}\n")
    a, b, c = (left_behind(tmp_path / name) for name in "abc")
    assert a == b and a.keys() == c.keys() == {"results/results_DATE.json", "results/samples_t_DATE.jsonl"}
    assert [name for name in a if a[name] != c[name]] == ["results/results_DATE.json"]
