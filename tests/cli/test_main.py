from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from genpoe_plugin import __version__
from genpoe_plugin.errors import InputError
from train_cli.main import LazyCommand, MainGroup, main

REPOSITORY = Path(__file__).parents[2]


def group_with(error: BaseException | None) -> click.Group:
    """A group like genpoe's, whose command ``train run`` raises ``error``."""
    outer = MainGroup("genpoe", lazy={})
    inner = click.Group("train")
    outer.add_command(inner)

    @inner.command("run")
    def run() -> None:
        click.echo("ran")
        if error is not None:
            raise error

    return outer


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (None, 0, ""),
        (
            InputError("data.tsv, line 3: two fields; one is missing"),
            2,
            "error: data.tsv, line 3: two fields; one is missing\n",
        ),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_exit_status_and_one_line(error: BaseException | None, status: int, line: str) -> None:
    result = CliRunner().invoke(group_with(error), ["train", "run"])
    assert (result.exit_code, result.stdout, result.stderr) == (status, "ran\n", line)


def test_other_errors_are_not_swallowed() -> None:
    result = CliRunner().invoke(group_with(ZeroDivisionError("a bug")), ["train", "run"])
    assert isinstance(result.exception, ZeroDivisionError)


def test_a_lazy_command_is_imported_on_use_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = "import click\n@click.command()\n@click.argument('word')\ndef say(word):\n    click.echo(word)\n"
    (tmp_path / "lazy_command_of_test.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    group = MainGroup("genpoe", lazy={"say": LazyCommand("lazy_command_of_test:say", "Say a word.")})
    listing = CliRunner().invoke(group, ["--help"])
    assert "say" in listing.output
    assert "Say a word." in listing.output
    assert "lazy_command_of_test" not in sys.modules
    assert CliRunner().invoke(group, ["say", "hello"]).output == "hello\n"
    assert CliRunner().invoke(group, ["shout", "hello"]).exit_code == 2


@pytest.mark.parametrize(
    "command", ["demo", "data", "index", "retrieve", "rerank", "train reranker", "train hypernetwork", "experts create"]
)
def test_every_command_is_there(command: str) -> None:
    result = CliRunner().invoke(main, [*command.split(), "--help"], prog_name="genpoe")
    assert result.exit_code == 0, result.exception
    assert result.output.startswith(f"Usage: genpoe {command} [OPTIONS]")


@pytest.mark.parametrize("command", [["--help"], ["train", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(command: list[str]) -> None:
    code = (
        "import sys\nfrom train_cli.main import main\n"
        f"try:\n    main({command!r}, prog_name='genpoe')\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'faiss', 'datasets', 'lm_eval'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_python_dash_m() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "train_cli", "--version"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.stdout == f"genpoe, version {__version__}\n"
