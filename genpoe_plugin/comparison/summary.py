"""Say in plain words what a leaderboard shows, from the same scores and tests as its table."""

from __future__ import annotations

from genpoe_plugin.comparison import cells
from genpoe_plugin.comparison.counterparts import closed_book_of, control_of, rag_of
from genpoe_plugin.comparison.leaderboard import Board, System
from genpoe_plugin.comparison.statistics import TIE
from genpoe_plugin.prompts import EXPERT_MODES

_VERBS = {"em": "exactly", "exact_match": "exactly", "acc": "correctly"}


def summary(board: Board) -> str:
    """The score of one system, its differences from closed-book answering and RAG, and its shuffled control.

    The system is the best one with experts alone, or else the best one with experts, or else the best one.
    """
    system = _subject(board)
    parts = [f"{_name(system, board)} {_score(system, board)}{_differences(system, board)}."]
    if (part := system.recovered) is not None:
        low, high = (cells.number(end) for end in (part.low, part.high))
        parts.append(f"It reaches {cells.number(part.fraction)} % [{low}, {high}] of RAG's gain over closed-book.")
    if system.control is None and system.settings.get("mode") in EXPERT_MODES:
        parts.append(_shuffled(system, board))
    return " ".join(parts)


def _subject(board: Board) -> System:
    ranked = [system for system in board.systems if system.control is None]
    for modes in (("genpoe",), EXPERT_MODES):
        for system in ranked:
            if system.settings.get("mode") in modes:
                return system
    return board.systems[0]


def _name(system: System, board: Board) -> str:
    mode = system.settings.get("mode")
    alike = [s for s in board.systems if s.control == system.control and s.settings.get("mode") == mode]
    if len(alike) == 1:
        return system.label
    best = system.estimates[board.metric].mean
    equal = sum(other.estimates[board.metric].mean == best for other in alike) - 1
    kind = f"systems with mode={mode}" if mode else "systems"
    tied = f", equal with {equal} other{'s' if equal > 1 else ''}" if equal else ""
    return f"Of {len(alike)} {kind}, {system.label} scores best{tied}: it"


def _score(system: System, board: Board, short: bool = False) -> str:
    metric = board.metric
    share = cells.is_share(metric, board)
    value = cells.number(system.estimates[metric].mean, share) + (" %" if share else "")
    adverb = _VERBS.get(metric) if share else None
    if short:
        return f"answers {value}" if adverb else f"has {value}"
    if adverb:
        return f"answers {value} of {board.n:,} questions {adverb}"
    lower = " (lower is better)" if board.sign < 0 else ""
    return f"has a mean {cells.unit(metric, False)} of {value} on {board.n:,} questions{lower}"


def _differences(system: System, board: Board) -> str:
    """The differences from the systems that matter most, each with its p-value."""
    settings = [other.settings for other in board.systems]
    own = system.number - 1
    others = {"closed-book": closed_book_of(system.settings, settings), "RAG": rag_of(system.settings, settings)}
    known = {name: place for name, place in others.items() if place not in (None, own)}
    if not known:
        best = [place for place, other in enumerate(board.systems[:2]) if place != own and other.control is None]
        known = {board.systems[place].label: place for place in best[:1]}
    texts = [text for name, place in known.items() if place is not None and (text := _than(name, own, place, board))]
    return f", {' and '.join(texts)}" if texts else ""


def _than(name: str, own: int, place: int, board: Board) -> str | None:
    pair = board.pair(own, place)
    if pair is None:
        return None
    if abs(pair.difference) < TIE:
        return f"the same as {name} (#{place + 1})"
    share = cells.is_share(board.metric, board)
    size = cells.number(abs(pair.difference), share)
    if share and abs(pair.difference) < 0.0005:
        size = "less than 0.1"
    points = f" point{'' if size == '1.0' else 's'}" if share else ""
    more = "more" if pair.difference > 0 else "less"
    doubt = "" if pair.significant else ", not significant"
    return f"{size}{points} {more} than {name} (#{place + 1}, {cells.p_value(pair.adjusted)}{doubt})"


def _shuffled(system: System, board: Board) -> str:
    """What the shuffled control says about the experts; the same test decides about the system's flag."""
    place = control_of(system.settings, "shuffled", [other.settings for other in board.systems])
    if place is None:
        return (
            "There is no run with another question's passages (passages=shuffled), so it is not tested whether the"
            " experts carry knowledge of the passages."
        )
    alone = system.settings["mode"] == "genpoe"
    if system.flag:
        shown = "it is not shown that the experts carry knowledge of the passages"
    elif alone:
        shown = "the experts carry knowledge of the passages"
    else:
        # The control exchanges the passages of the prompt as well.
        shown = "it uses its passages, in the prompt or as experts"
    pair = board.pair(system.number - 1, place)
    tested = f" ({cells.p_value(pair.adjusted)})" if pair else ""
    return f"With another question's passages it {_score(board.systems[place], board, short=True)}{tested}: {shown}."
