"""Rows of benchmarks: their aims, their table and their JSON file."""

from __future__ import annotations

import json
import sys
from importlib import import_module

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks.__main__ import ALL, ON_REQUEST, main
from benchmarks.row import Row, table, write


@pytest.mark.parametrize("value", [2, 2.5, np.float32(2.5), np.float64(2.5), np.int64(2)])
@pytest.mark.parametrize(("target", "holds"), [(None, None), (">= 2", True), ("<= 1.5", False)])
def test_values_of_any_numeric_type_are_written(value, target, holds, tmp_path):
    write([Row("compare.seconds", value, "s", target)], tmp_path / "rows.json")
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert row == {"name": "compare.seconds", "value": float(value), "unit": "s", "target": target, "holds": holds}


@pytest.mark.parametrize(
    ("value", "target", "holds"),
    [(3.0, ">= 3", True), (2.99, ">= 3", False), (0.5, "<= 0.5", True), (0.51, "<= 0.5", False), (7.0, None, None)],
)
def test_a_row_says_whether_its_aim_is_met(value, target, holds):
    row = Row("a.b", value, "x", target)
    assert row.holds is holds
    assert ("MISSED" in table([row]), "holds" in table([row])) == (holds is False, holds is True)


def test_columns_are_aligned():
    lines = table([Row("a.b", 2.0, "x", ">= 3"), Row("a.much.longer.name", 1.0, "x", ">= 3")]).splitlines()
    assert lines[0].index("aim") == lines[1].index("aim")


def test_the_file_has_machine_and_command(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "training", "--json", "a file"])
    write([Row("a.b", 2.0, "x", ">= 3"), Row("a.c", 1.0, "s")], tmp_path / "rows.json")
    record = json.loads((tmp_path / "rows.json").read_text())
    assert record["rows"] == [
        {"name": "a.b", "value": 2.0, "unit": "x", "target": ">= 3", "holds": False},
        {"name": "a.c", "value": 1.0, "unit": "s", "target": None, "holds": None},
    ]
    assert record["command"] == "python -m benchmarks training --json 'a file'"
    assert {"processor", "processors", "python", "torch", "transformers", "lm-eval-genpoe"} == set(record["machine"])


@pytest.mark.parametrize("name", [*ALL, *ON_REQUEST])
def test_every_benchmark_writes_its_rows(name, tmp_path, monkeypatch):
    module = import_module(f"benchmarks.{name.replace('-', '_')}")
    monkeypatch.setattr(module, "measure", lambda options: [Row(name, np.float32(2.5), "s", ">= 2")])
    done = CliRunner().invoke(main, [name, "--json", str(tmp_path / "rows.json")])
    assert done.exit_code == 0, done.output
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert row == {"name": name, "value": 2.5, "unit": "s", "target": ">= 2", "holds": True}
