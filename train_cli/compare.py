"""``genpoe compare``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from genpoe_plugin.errors import InputError

if TYPE_CHECKING:
    from genpoe_plugin.comparison.judging import Judging
    from genpoe_plugin.comparison.leaderboard import Comparison

WIDTH = 200  # characters per line of a table that is not printed to a terminal


@click.command()
@click.argument("results", nargs=-1, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Folder for page, Markdown, CSV, JSON.")
@click.option(
    "--export",
    "exports",
    multiple=True,
    type=click.Path(path_type=Path),
    help="FILE.tex: LaTeX tables. FILE.md: lm_eval's tables. A folder: Every Eval Ever's JSON. Repeatable.",
)
@click.option("--run", "config", type=click.Path(path_type=Path), help="Run this matrix (YAML) first, then compare it.")
@click.option("--jobs", default=1, show_default=True, type=click.IntRange(1), help="--run: lm_eval runs at a time.")
@click.option("--metric", help="Metric to rank by.  [default: em, or the main metric of tasks without em]")
@click.option("--allow", multiple=True, metavar="ASPECT", help="Rank together runs that differ in this; repeatable.")
@click.option("--judge", metavar="LLM", help="Also judge the answers by this LLM (directory or hub name).")
@click.option("--judge-model", default="hf", show_default=True, help="--judge: lm_eval's model class, such as vllm.")
@click.option("--judge-args", default="", metavar="ARGS", help="--judge: further model_args of that class.")
@click.option(
    "--judge-prompt",
    type=click.Path(path_type=Path),
    help="--judge: file with {question}, {accepted} and {answer}.  [default: the package's judge_prompt.txt]",
)
@click.option("--reproduce", metavar="ROW", help="Print the command of a row: its number, or TASK:NUMBER.")
def compare(
    results: tuple[Path, ...],
    out: Path | None,
    exports: tuple[Path, ...],
    config: Path | None,
    jobs: int,
    metric: str | None,
    allow: tuple[str, ...],
    judge: str | None,
    judge_model: str,
    judge_args: str,
    judge_prompt: Path | None,
    reproduce: str | None,
) -> None:
    """Show a leaderboard of the lm_eval runs in RESULTS, with intervals, paired tests, controls and costs.

    RESULTS are folders that lm_eval wrote to (--output_path, with --log_samples), of any model. Runs with other
    questions or settings get a separate table that says what differs. Broken results are named and left out.
    """
    if not results and config is None:
        raise click.UsageError("give RESULTS, folders that lm_eval wrote to, or --run CONFIG.yaml")
    from genpoe_plugin.comparison.comparability import ALLOWABLE
    from genpoe_plugin.comparison.leaderboard import compare as compare_runs

    if unknown := [aspect for aspect in allow if aspect not in ALLOWABLE]:
        raise InputError(f"--allow {unknown[0]}: not one of {', '.join(ALLOWABLE)}")
    if exports:
        from genpoe_plugin.comparison.exports import check_target

        for path in exports:
            check_target(path)
    folders = list(results)
    if config is not None:
        from genpoe_plugin.comparison.matrix import read_matrix, run_matrix

        matrix = read_matrix(config)
        run_matrix(matrix, jobs)
        folders.append(matrix.out)
        out = out or matrix.out / "comparison"
    judging = None
    if judge is not None:
        judging = _judging(judge, judge_model, judge_args, judge_prompt, folders[0])
    elif judge_args or judge_prompt:
        raise InputError("--judge-args, --judge-prompt: there is no judge; give --judge as well")
    comparison = compare_runs(folders, metric=metric, allow=allow, judging=judging)
    if reproduce is not None:
        _reproduce(comparison, reproduce)
        return
    show_in_terminal(comparison)
    if out is not None:
        from genpoe_plugin.comparison.output_files import write

        for path in write(comparison, out):
            click.echo(path)
    if exports:
        from genpoe_plugin.comparison.exports import export

        for target in exports:
            for path in export(comparison, target):
                click.echo(path)


def _judging(judge: str, model: str, arguments: str, prompt: Path | None, results: Path) -> Judging:
    """The judge, whose judgements are saved beside the first results."""
    from genpoe_plugin.comparison.judging import FILE, Judging, read_prompt

    text = read_prompt(prompt)
    from genpoe_plugin.lm.judge import LMJudge

    folder = results if results.is_dir() else results.parent
    return Judging(LMJudge(judge, model, arguments), text, folder / FILE)


def show_in_terminal(comparison: Comparison) -> None:
    """Print a comparison in the width of the terminal."""
    from rich.console import Console

    from genpoe_plugin.comparison.terminal import show

    console = Console()
    show(comparison, console if console.is_terminal else Console(width=WIDTH))


def _reproduce(comparison: Comparison, row: str) -> None:
    """Print the folder and the command of every run of a row, as shell commands."""
    import shlex

    from genpoe_plugin.comparison.cells import title
    from genpoe_plugin.comparison.origin import origin_of

    table, _, number = row.rpartition(":")
    matches = [
        system
        for board in comparison.boards
        for system in board.systems
        if (str(system.number) == number and table in ("", board.task, title(board, comparison.boards)))
        or system.name == row
    ]
    if not matches:
        rows = ", ".join(f"{title(b, comparison.boards)}:1 to {len(b.systems)}" for b in comparison.boards)
        raise InputError(f"--reproduce {row}: no such row; there are {rows}")
    if len(matches) > 1:
        names = ", ".join(f"{system.name} ({system.runs[0].task})" for system in matches)
        raise InputError(f"--reproduce {row}: in several tables; give the name of one: {names}")
    for run in matches[0].runs:
        origin = origin_of(run)
        if not origin.recorded:
            click.echo("# reconstructed from lm_eval's record of the run")
        if origin.directory:
            click.echo(f"cd {shlex.quote(origin.directory)}")
        click.echo(origin.command)
