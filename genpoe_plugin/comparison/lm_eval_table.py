"""Write a comparison as the tables that lm_eval prints, one for each system."""

from __future__ import annotations

import math
from collections.abc import Sequence

from genpoe_plugin.comparison import cells
from genpoe_plugin.comparison.leaderboard import Board, Comparison, System

_HEADER = ("Tasks", "Version", "Filter", "n-shot", "Metric", "", "Value", "", "Stderr")
_RIGHT = ("Version", "n-shot", "Value", "Stderr")


def lm_eval_tables(comparison: Comparison) -> str:
    """Markdown with a heading and a table for each system of each board."""
    parts = []
    for board in comparison.boards:
        for system in board.systems:
            parts.append(f"{cells.title(board, comparison.boards)}, #{system.number} {system.label}\n")
            parts.append(_markdown(_rows(board, system)))
    return "\n".join(parts)


def _rows(board: Board, system: System) -> list[list[str]]:
    """A row per metric, in lm_eval's order; the standard error of a mean over seeds is that of its questions."""
    run, n = system.runs[0], board.n
    rows: list[list[str]] = []
    for metric in sorted(board.metrics):
        scores = system.scores[metric]
        error = f"{scores.std(ddof=1) / math.sqrt(n):.4f}" if n > 1 else "N/A"
        arrow = "\u2191" if run.higher_is_better(metric) else "\u2193"
        name, _, filter_name = metric.partition("@")
        first = ["", ""] if rows else [board.task, str(run.report["versions"].get(board.task, ""))]
        shots = str(run.report["n-shot"].get(board.task, ""))
        rows.append([*first, filter_name or "none", shots, name, arrow, f"{scores.mean():.4f}", "\u00b1", error])
    return rows


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(3, *(len(row[at]) for row in (_HEADER, *rows))) for at in range(len(_HEADER))]
    rule = [f"{'-' * (width - 1)}{':' if name in _RIGHT else '-'}" for name, width in zip(_HEADER, widths, strict=True)]
    lines = [_line(_HEADER, widths), f"|{'|'.join(rule)}|", *(_line(row, widths) for row in rows)]
    return "".join(f"{line}\n" for line in lines)


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    padded = [
        text.rjust(width) if name in _RIGHT else text.ljust(width)
        for text, width, name in zip(row, widths, _HEADER, strict=True)
    ]
    return f"|{'|'.join(padded)}|"
