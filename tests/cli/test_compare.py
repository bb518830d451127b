"""``genpoe compare`` through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from benchmarks.synthetic_results import documents, genpoe_facts, write_run
from train_cli.main import main

DOCS = documents(40, passages=2)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["compare", *map(str, arguments)])


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    for control, right in (("retrieved", 30), ("shuffled", 29)):
        em = {"em": [float(n < right) for n in range(40)]}
        write_run(folder / control, em, docs=DOCS, genpoe=genpoe_facts("genpoe", control))
    write_run(folder / "hf", {"em": [float(n < 4) for n in range(40)]}, docs=DOCS, shots=2)
    broken = write_run(folder / "broken", {"em": [1.0] * 40}, docs=DOCS)
    broken.write_text("{")
    return folder


def test_a_table_what_is_wrong_and_what_is_left_out(results: Path, tmp_path: Path) -> None:
    result = run(results, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "75.0 [59.8, 85.8]" in result.output
    assert "#1 genpoe K=4: experts carry no passage knowledge (em 0.750 with its passages, 0.725" in result.output
    assert "Not ranked together with the first board of this task" in result.output
    assert "shots: 2" in result.output
    assert "left out: " in result.output and "broken/model/results_2026-01-01T00-00-00.000000.json" in result.output
    told = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [board["n"] for board in told["boards"]] == [40, 40] and len(told["left_out"]) == 1
    assert result.output.splitlines()[-6:] == [
        str(tmp_path / "out" / name)
        for name in ("index.html", "leaderboard.md", "comparison.json", "leaderboard.csv", "pairs.csv", "questions.csv")
    ]


def test_a_terminal_shows_the_first_metrics_and_names_the_others(tmp_path: Path) -> None:
    right = [float(n < 10) for n in range(40)]
    write_run(tmp_path / "run", {name: right for name in ("em", "f1", "third", "fourth", "fifth")}, docs=DOCS)
    result = run(tmp_path / "run", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "third" in result.output and "More metrics, written with --out: fourth, fifth" in result.output
    assert result.output.count("fourth") == 1
    assert r"fifth % \[95 %]" in (tmp_path / "out" / "leaderboard.md").read_text()


def test_exports(results: Path, tmp_path: Path) -> None:
    result = run(
        results, "--export", tmp_path / "a" / "table.tex", "--export", tmp_path / "b.md", "--export", tmp_path / "c"
    )
    assert result.exit_code == 0, result.output
    assert r"\begin{tabular}" in (tmp_path / "a" / "table.tex").read_text()
    assert "|Tasks|" in (tmp_path / "b.md").read_text()
    assert len(list((tmp_path / "c").rglob("*.json"))) == 3
    assert str(tmp_path / "b.md") in result.output.splitlines()


def test_the_command_of_a_row(results: Path) -> None:
    result = run(results, "--reproduce", "t, board 1 of 2:2")
    assert result.exit_code == 0, result.output
    assert result.output.splitlines() == [
        "cd /somewhere",
        "lm_eval run --model genpoe --model_args mode=genpoe,passages=shuffled,seed=0",
    ]
    other = run(results, "--reproduce", "t, board 2 of 2:1").output.splitlines()
    assert other[0] == "# reconstructed from lm_eval's record of the run"
    assert other[1].startswith("lm_eval --model hf --model_args pretrained=llm --tasks t --num_fewshot 2")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "give RESULTS"),
        (("nothing",), "nothing: no such file or folder"),
        (("RESULTS", "--metric", "rouge"), "metric rouge: no run has it"),
        (("RESULTS", "--allow", "questions"), "--allow questions: not one of version"),
        (("RESULTS", "--export", "table.xlsx"), "--export table.xlsx: give FILE.tex (LaTeX)"),
        (("RESULTS", "--reproduce", "7"), "--reproduce 7: no such row; there are t, board 1 of 2:1 to 2"),
        (("RESULTS", "--reproduce", "1"), "--reproduce 1: in several tables; give the name of one"),
        (("--run", "nothing.yaml"), "nothing.yaml: no such file"),
    ],
)
def test_bad_input_is_one_line(results: Path, arguments: tuple[str, ...], said: str) -> None:
    result = run(*(results if word == "RESULTS" else word for word in arguments))
    assert result.exit_code == 2
    assert said in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.output
