"""``genpoe demo world`` through the command line; the demos themselves are tested in tests/demo."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from genpoe_plugin.demo import world_demo
from genpoe_plugin.demo.world_demo import RUNS, DemoResult, DemoSettings
from genpoe_plugin.demo.world_table import Row, render
from train_cli.main import main

ROWS = [Row(mode, passages, 15, 0.6, 0.13, 0.7, 0.12, 99.0) for mode, passages in RUNS]
COMMAND = "lm_eval --model genpoe --model_args mode=genpoe"


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["demo", "world", *map(str, arguments)], prog_name="genpoe")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, DemoSettings]]:
    """Puts a result in the place of the demo."""
    made: list[tuple[Path, DemoSettings]] = []

    def run_demo(out: Path, settings: DemoSettings) -> DemoResult:
        made.append((out, settings))
        return DemoResult(ROWS, 0.289, COMMAND)

    monkeypatch.setattr(world_demo, "run_demo", run_demo)
    return made


def test_it_prints_the_table_the_comparison_and_a_command(calls: list[Any], tmp_path: Path) -> None:
    out = tmp_path / "a folder"
    result = invoke("--out", out, "--seed", 7)
    assert result.exit_code == 0, result.output
    assert calls == [(out, DemoSettings(seed=7))]
    assert render(ROWS) in result.stdout
    assert "genpoe_rag against rag, paired: p = 0.29 (exact McNemar test)." in result.stdout
    assert [line for line in result.stdout.splitlines() if line.startswith("lm_eval ")] == [COMMAND]
    assert result.stdout.endswith(f"\ntable: {out / 'table.json'}\n")


def test_the_folder_has_a_default(calls: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert invoke().exit_code == 0
    assert calls == [(Path("demo-world-out"), DemoSettings())]


@pytest.mark.parametrize(
    ("changed", "named"),
    [({"seed": 3}, "seed"), ({"test_entities": 9, "version": "0.0.1"}, "test_entities, version")],
)
def test_a_folder_with_other_settings_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], named: str
) -> None:
    monkeypatch.delattr(world_demo, "make_world")  # or, if it is not refused, minutes of work begin
    (tmp_path / "settings.json").write_text(json.dumps(asdict(DemoSettings()) | changed))
    result = invoke("--out", tmp_path)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr == f"error: {tmp_path}: made with another {named}; choose another --out or delete it\n"
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]


@pytest.mark.parametrize("arguments", [["--seed", "-1"], ["--seed", "x"], ["--size", "3"]])
def test_wrong_options_start_nothing(calls: list[Any], tmp_path: Path, arguments: list[str]) -> None:
    result = invoke("--out", tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("Error: ")
    assert calls == [] and not (tmp_path / "out").exists()
