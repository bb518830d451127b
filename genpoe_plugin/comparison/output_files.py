"""Write a comparison as files: HTML page, Markdown, CSV for spreadsheets, and JSON for programs."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from genpoe_plugin import __version__
from genpoe_plugin.comparison import cells
from genpoe_plugin.comparison.leaderboard import Board, Comparison, System
from genpoe_plugin.comparison.markdown import markdown
from genpoe_plugin.comparison.origin import origin_of
from genpoe_plugin.comparison.summary import summary
from genpoe_plugin.files import atomic_file, writing

FORMAT, VERSION = "genpoe-comparison", 1
PAGE, MARKDOWN, RECORD = "index.html", "leaderboard.md", "comparison.json"
ROWS, PAIRS, QUESTIONS = "leaderboard.csv", "pairs.csv", "questions.csv"


def write(comparison: Comparison, out: Path) -> list[Path]:
    """Write all files into ``out``, each atomically; they replace those of an earlier comparison.

    Returns:
        The paths of the files.

    Raises:
        InputError: a file cannot be written.
    """
    from genpoe_plugin.comparison.page import page

    texts: dict[str, Callable[[], str]] = {
        PAGE: lambda: page(comparison),
        MARKDOWN: lambda: markdown(comparison),
        RECORD: lambda: json.dumps(record(comparison), indent=1, ensure_ascii=False) + "\n",
    }
    tables: dict[str, Callable[[], Iterable[list[Any]]]] = {
        ROWS: lambda: _rows(comparison),
        PAIRS: lambda: _pairs(comparison),
        QUESTIONS: lambda: _questions(comparison),
    }
    with writing(out, "no file is incomplete"):
        for name, text in texts.items():
            with atomic_file(out / name) as temporary:
                temporary.write_text(text(), encoding="utf-8")
        for name, lines in tables.items():
            with atomic_file(out / name) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows(lines())
    return [out / name for name in (*texts, *tables)]


def record(comparison: Comparison) -> dict[str, Any]:
    """The comparison as JSON data, without the single questions, which are in the CSV."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "made_by": f"lm-eval-genpoe {__version__}",
        "bootstrap_draws": comparison.draws,
        "boards": [_board(board, comparison) for board in comparison.boards],
        "left_out": [{"path": str(entry.path), "reason": entry.reason} for entry in comparison.left_out],
        "notes": list(comparison.notes),
    }


def _board(board: Board, comparison: Comparison) -> dict[str, Any]:
    return {
        "title": cells.title(board, comparison.boards),
        "task": board.task,
        "n": board.n,
        "metric": board.metric,
        "summary": summary(board),
        "protocol": asdict(board.group.protocol),
        "differences": [asdict(entry) for entry in board.group.differences],
        "allowed": [asdict(entry) for entry in board.group.allowed],
        "systems": [_system(system) for system in board.systems],
        "pairs": [
            asdict(pair) | {"first": board.systems[pair.first].name, "second": board.systems[pair.second].name}
            for pair in board.pairs
        ],
        "method": cells.method(comparison, board),
    }


def _system(system: System) -> dict[str, Any]:
    return {
        "number": system.number,
        "name": system.name,
        "label": system.label,
        "control": system.control,
        "rank": system.rank,
        "flag": system.flag,
        "caution": system.caution,
        "settings": system.settings,
        "scores": {metric: asdict(estimate) for metric, estimate in system.estimates.items()},
        "seeds": system.seeds,
        "cost": asdict(system.cost),
        "recovered": system.recovered and asdict(system.recovered),
        **{
            part: {name: asdict(estimate) for name, estimate in getattr(system, part).items()}
            for part in ("by_given", "by_rank", "by_length", "by_known")
        },
        "runs": [asdict(origin_of(run)) for run in system.runs],
    }


def _rows(comparison: Comparison) -> Iterable[list[Any]]:
    metrics = list(dict.fromkeys(metric for board in comparison.boards for metric in board.metrics))
    yield [
        *("board", "task", "number", "name", "system", "control", "rank_best", "rank_worst", "n", "seeds"),
        *(f"{metric}{part}" for metric in metrics for part in ("", "_low", "_high")),
        *("recovered", "recovered_low", "recovered_high"),
        *("seconds_per_question", "whole_command", "peak_bytes", "memory_of"),
        *("first_token_seconds", "expert_bytes_per_question", "flag", "caution", "results", "command"),
    ]
    for number, board in enumerate(comparison.boards, 1):
        for system in board.systems:
            fraction = system.recovered
            estimates = [system.estimates.get(metric) for metric in metrics]
            origins = [origin_of(run) for run in system.runs]
            yield [
                *(number, board.task, system.number, system.name, system.label, system.control or ""),
                *(system.rank or ("", "")),
                *(board.n, len(system.runs)),
                *(value for part in estimates for value in ((part.mean, part.low, part.high) if part else ("",) * 3)),
                *((fraction.fraction, fraction.low, fraction.high) if fraction else ("",) * 3),
                *(system.cost.seconds, system.cost.whole_command, system.cost.peak_bytes, system.cost.memory_of),
                *(system.cost.first_token, system.cost.expert_bytes),
                *(system.flag or "", system.caution or ""),
                *(" ".join(origin.results for origin in origins), "\n".join(origin.command for origin in origins)),
            ]


def _pairs(comparison: Comparison) -> Iterable[list[Any]]:
    yield [
        *("board", "task", "family", "metric", "first", "first_system", "second", "second_system"),
        *("difference", "low", "high", "wins", "losses", "p_bootstrap", "p_mcnemar_mid", "p_mcnemar_exact", "p_holm"),
    ]
    for number, board in enumerate(comparison.boards, 1):
        for pair in board.pairs:
            first, second = board.systems[pair.first], board.systems[pair.second]
            yield [
                *(number, board.task, pair.family, pair.metric),
                *(first.number, first.label, second.number, second.label),
                *(pair.difference, pair.low, pair.high, pair.wins, pair.losses),
                *(pair.bootstrap, pair.mcnemar, pair.exact, pair.adjusted),
            ]


def _questions(comparison: Comparison) -> Iterable[list[Any]]:
    """One line per question of every board, with each system's score on the ranking metric (``#1`` and so on)."""
    most = max(len(board.systems) for board in comparison.boards)
    yield ["board", "task", "metric", "question", "answers", *(f"#{number}" for number in range(1, most + 1))]
    for number, board in enumerate(comparison.boards, 1):
        columns = [system.scores[board.metric].tolist() for system in board.systems]
        for question, *scores in zip(board.group.runs[0].questions.tolist(), *columns, strict=True):
            rounded = [int(score) if score in (0.0, 1.0) else round(score, 6) for score in scores]
            book = comparison.book
            yield [number, board.task, board.metric, book.texts[question], book.targets[question], *rounded]
