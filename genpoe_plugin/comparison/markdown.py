"""Write a comparison as Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from textwrap import indent

from genpoe_plugin.comparison import cells
from genpoe_plugin.comparison.leaderboard import Comparison
from genpoe_plugin.comparison.origin import origin_of
from genpoe_plugin.comparison.summary import summary


def markdown(comparison: Comparison) -> str:
    """All boards, with warnings, the method, and the command of every row."""
    parts = ["# Leaderboard\n"]
    for board in comparison.boards:
        parts.append(f"## {_text(cells.title(board, comparison.boards))}\n")
        parts.append(f"{_text(summary(board))}\n")
        if board.group.differences:
            parts.append("Not ranked together with the first board of this task; the differences:\n")
            parts.append("".join(f"- {_text(line)}\n" for line in cells.differences(board)))
        for line in cells.allowed(board):
            parts.append(f"**{_text(line)}**\n")
        for line, wrong in cells.warnings(board):
            parts.append(f"**⚠ {_text(line)}**\n" if wrong else f"{_text(line)}\n")
        parts.append(_table(*cells.table(board)))
        parts.append("".join(f"- {_text(line)}\n" for line in cells.method(comparison, board)))
        parts.append("The commands:\n")
        for system in board.systems:
            for run in system.runs:
                origin = origin_of(run)
                where = f", in {_text(origin.directory)}" if origin.directory else ""
                how = "" if origin.recorded else " (reconstructed from lm_eval's record)"
                fence = "`" * max(3, 1 + max(map(len, re.findall("`+", origin.command)), default=0))
                command = indent(f"{fence}\n{origin.command}\n{fence}\n", "   ")
                parts.append(f"{system.number}. {_text(system.label)}{where}{how}\n\n{command}")
    if comparison.left_out or comparison.notes:
        parts.append("## Left out, and notes\n")
        parts.append("".join(f"- {_text(str(entry.path))}: {_text(entry.reason)}\n" for entry in comparison.left_out))
        parts.append("".join(f"- {_text(note)}\n" for note in comparison.notes))
    return "\n".join(parts)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(_text, line))} |\n" for line in lines)


def _text(text: str) -> str:
    """Escape Markdown's special characters."""
    for character in ("\\", "|", "*", "_", "<", "[", "`"):
        text = text.replace(character, f"\\{character}")
    return text.replace("\n", " ")
