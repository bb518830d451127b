"""Print a comparison in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from genpoe_plugin.comparison import cells
from genpoe_plugin.comparison.leaderboard import Comparison, System
from genpoe_plugin.comparison.summary import summary
from genpoe_plugin.errors import harmless

MAX_METRICS = 3  # a terminal has no room for more columns


def show(comparison: Comparison, console: Console) -> None:
    """Print every board with its warnings, and the results that were left out."""
    for board in comparison.boards:
        console.print(_escaped(summary(board)), highlight=False)
        header, rows = cells.table(board, MAX_METRICS)
        table = Table(title=_escaped(cells.title(board, comparison.boards)), title_justify="left")
        for name in header:
            table.add_column(name, justify="left" if name in ("rank", "system") else "right", overflow="fold")
        for system, row in zip(board.systems, rows, strict=True):
            style = "bold red" if system.flag else "dim" if system.control else ""
            table.add_row(*map(_escaped, row), style=style, end_section=_last_ranked(board.systems, system))
        console.print(table)
        for line, wrong in cells.warnings(board):
            console.print(_escaped(line), style="bold red" if wrong else "yellow", highlight=False)
        if board.group.differences:
            console.print("Not ranked together with the first board of this task; the differences:", style="yellow")
        for line in cells.differences(board):
            console.print(_escaped(f"  {line}"), highlight=False)
        for line in cells.allowed(board):
            console.print(_escaped(line), style="yellow", highlight=False)
        if more := board.metrics[MAX_METRICS:]:
            console.print(f"More metrics, written with --out: {_escaped(', '.join(more))}", highlight=False)
        for line in cells.method(comparison, board):
            console.print(_escaped(line), style="dim", highlight=False)
        console.print()
    for left_out in comparison.left_out:
        console.print(_escaped(f"left out: {left_out.path}: {left_out.reason}"), style="yellow", highlight=False)
    for note in comparison.notes:
        console.print(_escaped(f"note: {note}"), style="yellow", highlight=False)


def _last_ranked(systems: Sequence[System], system: System) -> bool:
    return system.number < len(systems) and system.control is None and systems[system.number].control is not None


def _escaped(text: str) -> str:
    """Text with names and words of others, which must have no effect: neither rich's markup nor a terminal's control
    characters."""
    return escape("\n".join(map(harmless, text.split("\n"))))
