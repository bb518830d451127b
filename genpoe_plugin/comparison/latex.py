"""Write a comparison as LaTeX tables in the style of booktabs."""

from __future__ import annotations

from collections.abc import Sequence

from genpoe_plugin.comparison import cells
from genpoe_plugin.comparison.leaderboard import Board, Comparison
from genpoe_plugin.comparison.summary import summary

_LEFT = ("rank", "system")
_ESCAPES = {
    **{character: f"\\{character}" for character in "#$%&_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"<": "$<$", ">": "$>$", "|": "$|$", cells.MINUS: "$-$", "\u0394": r"$\Delta$", "\u2013": "--"},
}


def latex(comparison: Comparison) -> str:
    """A ``table`` for every board, with what the table shows as the caption; notes are comments."""
    tables = "\n".join(_table(board, comparison) for board in comparison.boards)
    comments = ["In the preamble: \\usepackage{booktabs}", *(" ".join(note.split()) for note in comparison.notes)]
    return "\n".join([*(f"% {line}" for line in comments), "", tables])


def _table(board: Board, comparison: Comparison) -> str:
    header, rows = cells.table(board)
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_text(cells.title(board, comparison.boards))}. {_text(summary(board))}}}",
        rf"\begin{{tabular}}{{{''.join('l' if name in _LEFT else 'r' for name in header)}}}",
        r"\toprule",
        _row(header),
        r"\midrule",
    ]
    for place, (system, row) in enumerate(zip(board.systems, rows, strict=True)):
        if place and system.control is not None and board.systems[place - 1].control is None:
            lines.append(r"\midrule")
        lines.append(_row(row))
    lines += [r"\bottomrule", r"\end{tabular}", *(f"% {line}" for line in cells.method(comparison, board))]
    return "\n".join([*lines, r"\end{table}", ""])


def _row(row: Sequence[str]) -> str:
    return rf"{' & '.join(map(_text, row))} \\"


def _text(text: str) -> str:
    return "".join(_ESCAPES.get(character, character) for character in text.replace("\n", " "))
