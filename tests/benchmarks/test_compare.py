from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import compare as benchmark
from benchmarks.__main__ import main
from benchmarks.options import Options
from genpoe_plugin.comparison.leaderboard import compare


def test_all_runs_are_in_one_board(tmp_path: Path) -> None:
    benchmark.write_runs(tmp_path, 34, 40)
    comparison = compare([tmp_path], draws=50)
    assert not comparison.left_out and not comparison.notes
    (board,) = comparison.boards
    assert board.n == 40
    assert sum(len(system.runs) for system in board.systems) == 34
    assert sorted(len(system.runs) for system in board.systems if system.control == "shuffled") == [3, 3, 3, 3]


def test_there_are_settings_for_all_runs(tmp_path: Path) -> None:
    benchmark.write_runs(tmp_path, benchmark.RUNS, 5)
    assert len([*tmp_path.rglob("results_*.json")]) == benchmark.RUNS == 100


def test_the_command_itself_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def stand_in(arguments, environment):
        called.append(list(map(str, arguments)))
        out = Path(arguments[-1])
        out.mkdir()
        (out / "index.html").write_text("x" * 2_000_000)
        (out / "comparison.json").write_text("{}")
        return "", 500_000_000

    monkeypatch.setattr(benchmark, "run_child", stand_in)
    measured = benchmark.measure(Options(quick=True, out=tmp_path))
    rows = {row.name.partition(": ")[2]: row for row in measured}
    assert called == [
        ["-m", "train_cli", "compare", f"{tmp_path / '12-runs-of-500'}", "--out", f"{tmp_path}/comparison"]
    ]
    assert rows["peak memory"].value == 0.5 and rows["peak memory"].holds
    assert rows["processor time"].unit == "s" and rows["processor time"].value >= 0
    assert rows["page"].value == 2
    assert rows["time"].unit == "s" and rows["time"].target == "<= 40"

    # Some values are numpy types, which JSON cannot represent.
    monkeypatch.setattr(benchmark, "measure", lambda options: measured)
    done = CliRunner().invoke(main, ["compare", "--json", str(tmp_path / "rows.json")])
    assert done.exit_code == 0, done.output
    written = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [(row["name"], row["value"], row["holds"]) for row in written] == [
        (row.name, row.value, row.holds) for row in measured
    ]
