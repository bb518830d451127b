"""``real-llm rankings``: MRR and differences computed by hand, and files that cannot be compared."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner
from scipy.stats import ttest_rel

from benchmarks.__main__ import main


def write(path, marks, prefix="question"):
    """One question per list of marks."""
    lines = [
        {
            "question": f"{prefix} {number}",
            "answers": ["x"],
            "ctxs": [{"title": "", "text": f"passage {rank}", "has_answer": mark} for rank, mark in enumerate(row)],
        }
        for number, row in enumerate(marks)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(*words):
    return CliRunner().invoke(main, ["real-llm", "rankings", *map(str, words)])


def test_mrr_and_differences_are_those_of_the_ranks(tmp_path):
    rng = np.random.default_rng(0)
    found = {name: [np.roll(range(12), rng.integers(12)) == 0 for _ in range(80)] for name in ("words", "llm")}
    files = [f"{name}={write(tmp_path / name, [list(map(bool, m)) for m in marks])}" for name, marks in found.items()]
    result = run(*files)
    assert result.exit_code == 0, result.output
    expected = {}
    for name, marks in found.items():
        ranks = np.array([int(np.argmax(row)) + 1 for row in marks])
        expected[name] = np.where(ranks <= 10, 1 / ranks, 0)
    cells = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:]]
        for line in result.output.split("\n")[2:-1]
    }
    assert float(cells["words"][0]) == pytest.approx(expected["words"].mean(), abs=5e-4)
    assert float(cells["llm"][0]) == pytest.approx(expected["llm"].mean(), abs=5e-4)
    assert float(cells["llm, best possible order"][0]) == pytest.approx(np.mean(expected["llm"] > 0), abs=5e-4)
    interval = ttest_rel(expected["llm"], expected["words"]).confidence_interval()
    difference, rest = cells["words"][1].split(" (")
    low, _, high = rest.rstrip(")").split()
    assert float(difference) == pytest.approx(expected["llm"].mean() - expected["words"].mean(), abs=1e-3)
    assert (float(low), float(high)) == pytest.approx((interval.low, interval.high), abs=0.02)


def test_rankings_that_cannot_be_compared_are_refused(tmp_path):
    one = write(tmp_path / "one", [[True, False]])
    other, unknown, empty = (
        write(tmp_path / "other", [[True]], prefix="another"),
        write(tmp_path / "unknown", [[None, True]]),
        write(tmp_path / "empty", []),
    )
    for words, message in (
        ((f"a={one}", f"b={other}"), "b: has other questions than a, or another order"),
        ((f"a={unknown}",), "has passages without has_answer"),
        ((f"a={empty}",), "the file is empty"),
        ((str(one),), "is not NAME=FILE"),
        ((f"a={tmp_path / 'missing'}",), "missing"),
    ):
        result = run(*words)
        assert result.exit_code == 2 and message in result.output, result.output
        assert "Traceback" not in result.output


def test_files_of_the_same_name_are_joined(tmp_path):
    first, second = write(tmp_path / "first", [[True, False]]), write(tmp_path / "second", [[False, True]] * 3)
    result = run(f"a={first}", f"a={second}")
    assert result.exit_code == 0 and "| a | 0.625 |" in result.output and "of 4 questions" in result.output
    result = run(f"a={first}", f"a={second}", f"b={first}")
    assert result.exit_code == 2 and "b: has other questions than a" in result.output
