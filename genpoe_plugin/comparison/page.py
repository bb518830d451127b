"""Write a comparison as one self-contained HTML page: tables, plots, single questions, and origins."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from genpoe_plugin import __version__
from genpoe_plugin.comparison import cells
from genpoe_plugin.comparison.breakdown import differing_questions
from genpoe_plugin.comparison.comparability import ASPECTS, describe
from genpoe_plugin.comparison.leaderboard import Board, Comparison, Pair, System
from genpoe_plugin.comparison.origin import origin_of
from genpoe_plugin.comparison.plots import plots
from genpoe_plugin.comparison.summary import summary
from genpoe_plugin.data.questions import passages_from_ctxs
from genpoe_plugin.errors import InputError
from genpoe_plugin.prompts import PROMPT_MODES

QUESTIONS = 200
"""Largest number of single questions on the page; the CSV has all."""
MAX_MATRIX = 12
"""Largest number of systems in the table of all pairs; with more, only the most important pairs are listed."""
_MAX_CHARACTERS = 300  # of a passage or an answer


def page(comparison: Comparison) -> str:
    """The page as HTML."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    source = files("genpoe_plugin.comparison").joinpath("page.html.jinja").read_text(encoding="utf-8")
    boards = [_board(board, comparison, number) for number, board in enumerate(comparison.boards, 1)]
    return environment.from_string(source).render(
        boards=boards,
        filters=_filters(comparison),
        left_out=comparison.left_out,
        notes=comparison.notes,
        version=__version__,
        most_questions=QUESTIONS,
    )


def _filters(comparison: Comparison) -> dict[str, list[str]]:
    """What the rows of all tables can be filtered by: only what differs between them."""
    systems = [system for board in comparison.boards for system in board.systems]
    values = {
        "task": [board.task for board in comparison.boards],
        "model": [_model(system) for system in systems],
        "mode": [_mode(system) for system in systems],
    }
    distinct = {name: list(dict.fromkeys(given)) for name, given in values.items()}
    return {name: given for name, given in distinct.items() if len(given) > 1}


def _model(system: System) -> str:
    """The LLM's name, without the folders before it."""
    settings = system.settings
    return Path(str(next((settings[name] for name in ("pretrained", "model", "path") if name in settings), ""))).name


def _mode(system: System) -> str:
    return str(system.settings.get("mode") or system.settings.get("kind"))


def _board(board: Board, comparison: Comparison, number: int) -> dict[str, Any]:
    header, rows = cells.table(board)
    return {
        "id": f"board{number}",
        "title": cells.title(board, comparison.boards),
        "n": board.n,
        "summary": summary(board),
        "metric": cells.unit(board.metric, False),
        "header": header,
        "task": board.task,
        "rows": [(s, row, _model(s), _mode(s)) for s, row in zip(board.systems, rows, strict=True)],
        "warnings": cells.warnings(board),
        "differences": cells.differences(board),
        "allowed": cells.allowed(board),
        "protocol": _protocol(board),
        "plots": [
            {"title": plot.title, "note": plot.note, "wide": Markup(plot.wide), "narrow": Markup(plot.narrow)}
            for plot in plots(board, f"b{number}")
        ],
        "matrix": _matrix(board),
        "pairs": [_pair(pair, board) for pair in _listed_pairs(board)],
        "all_pairs": sum(pair.metric == board.metric for pair in board.pairs),
        "origins": [(system, [origin_of(run) for run in system.runs]) for system in board.systems],
        "questions": _json(_questions(board, comparison)),
        "method": cells.method(comparison, board),
    }


def _protocol(board: Board) -> list[tuple[str, str]]:
    aspects = [(aspect, describe(board.group.protocol, aspect)) for aspect in ASPECTS]
    return [("task", board.task), *(("few-shot" if name == "shots" else name, value) for name, value in aspects)]


def _matrix(board: Board) -> dict[str, Any] | None:
    """All differences between ranked systems, row minus column; None for too few or too many systems."""
    ranked = [system for system in board.systems if system.control is None]
    if not 2 < len(ranked) <= MAX_MATRIX:
        return None
    share = cells.is_share(board.metric, board)
    entries: dict[tuple[int, int], dict[str, Any]] = {}
    for pair in board.pairs:
        if pair.family == "ranked" and pair.metric == board.metric:
            for entry in (pair, pair.reversed()):
                entries[entry.first, entry.second] = {
                    "difference": cells.number(entry.difference, share, signed=True),
                    "wins": f"{entry.wins:,}\u2009:\u2009{entry.losses:,}",
                    "significant": entry.significant,
                    "better": entry.difference > 0,
                }
    places = range(len(ranked))
    return {"systems": ranked, "rows": [[entries.get((row, column)) for column in places] for row in places]}


def _listed_pairs(board: Board) -> list[Pair]:
    """The pairs to list: each system with the first one, and with its controls."""
    return [p for p in board.pairs if p.metric == board.metric and (p.family == "controls" or p.first == 0)]


def _pair(pair: Pair, board: Board) -> dict[str, Any]:
    share = cells.is_share(board.metric, board)
    low, high = (cells.number(end, share, signed=True) for end in (pair.low, pair.high))
    return {
        "first": board.systems[pair.first],
        "second": board.systems[pair.second],
        "difference": f"{cells.number(pair.difference, share, signed=True)} [{low}, {high}]",
        "wins": f"{pair.wins:,}",
        "losses": f"{pair.losses:,}",
        "ties": f"{board.n - pair.wins - pair.losses:,}",
        "p": ["" if p is None else f"{p:.2g}" for p in (pair.mcnemar, pair.bootstrap, pair.adjusted)],
        "significant": pair.significant,
    }


def _questions(board: Board, comparison: Comparison) -> dict[str, Any]:
    """Some questions on which systems differ, with answers, scores, passages and prompts of every system."""
    pairs = [(pair.first, pair.second) for pair in board.pairs if pair.metric == board.metric]
    places = differing_questions([system.scores[board.metric] for system in board.systems], pairs, QUESTIONS)
    numbers = board.group.runs[0].questions
    passages: dict[tuple[str, str], int] = {}
    texts: list[dict[str, str]] = []
    entries = [
        {
            "question": comparison.book.texts[numbers[place]],
            "answers": comparison.book.targets[numbers[place]],
            "by": [],
        }
        for place in places
    ]
    if places and board.group.runs[0].sample(places[0])["doc"].get("question") is None:
        for entry, place in zip(entries, places, strict=True):
            entry["question"] = _cut(_task_prompt(board.group.runs[0].sample(place)) or "")
    lines: dict[str, int] = {}
    prompts: dict[tuple[int, ...], int] = {}
    for system in board.systems:
        bodies = _bodies(system, places)
        for entry, place, (answer, trace_passages, known, prompt) in zip(entries, places, bodies, strict=True):
            used = []
            for passage in trace_passages:
                name = (str(passage["id"]), str(passage.get("title") or ""))
                if name not in passages:
                    passages[name] = len(texts)
                    texts.append({"id": name[0], "title": name[1], "text": _cut(known.get(name[0], ""))})
                used.append([passages[name], round(passage["gate"], 3), passage["has_answer"]])
            score = round(float(system.scores[board.metric][place]), 3)
            # Prompts share most lines (passages and examples), so the page stores each line once.
            numbered = prompt and tuple(lines.setdefault(line, len(lines)) for line in prompt.split("\n"))
            entry["by"].append([_cut(answer), score, used, numbered and prompts.setdefault(numbered, len(prompts))])
    return {
        "systems": [f"{system.number}  {system.label}" for system in board.systems],
        "questions": entries,
        "passages": texts,
        "lines": list(lines),
        "prompts": list(prompts),
        "metric": cells.unit(board.metric, False),
    }


def _bodies(
    system: System, places: Sequence[int]
) -> list[tuple[str, list[dict[str, Any]], dict[str, str], str | None]]:
    """What a system's first run read and answered, for some questions.

    Returns:
        For each question: the answer, the passages in the trace, the texts of the doc's passages by id, and the prompt
        that the LLM read, if it is known.
    """
    bodies = []
    for place in places:
        sample = system.runs[0].sample(place)
        answer = sample.get("filtered_resps") or ""
        line = system.used.line(place) if system.used else {}
        prompt = line.get("prompt")
        if prompt is None and system.settings.get("mode") not in PROMPT_MODES:
            prompt = _task_prompt(sample)  # in this mode, the LLM reads the task's prompt unchanged
        answer = answer[0] if isinstance(answer, list) else answer
        bodies.append((str(answer), line.get("passages", []), _texts(sample["doc"]), prompt))
    return bodies


def _task_prompt(sample: dict[str, Any]) -> str | None:
    """The task's own prompt, from lm-eval's log."""
    try:
        return str(next(iter(sample["arguments"].values()))["arg_0"])
    except (LookupError, TypeError, AttributeError, StopIteration):
        return None


def _texts(doc: dict[str, Any]) -> dict[str, str]:
    """The texts of a doc's passages, by their ids in the trace."""
    try:
        return {entry.passage.id: entry.passage.text for entry in passages_from_ctxs(doc.get("ctxs") or (), "")}
    except InputError:
        return {}


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS]}\u2026"


def _json(value: Any) -> Markup:
    """JSON that is safe inside a script element."""
    return Markup(json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"))
