"""The cells of a leaderboard as text, the same in terminal, Markdown and page."""

from __future__ import annotations

from collections.abc import Sequence

from genpoe_plugin.comparison.breakdown import Estimate
from genpoe_plugin.comparison.leaderboard import Board, Comparison, Cost, Pair, System

MINUS = "\u2212"
RECOVERED = "recovered % [95 %]"


def is_share(metric: str, board: Board) -> bool:
    """Whether a metric is between 0 and 1 on all questions."""
    return all(((s.scores[metric] >= 0) & (s.scores[metric] <= 1)).all() for s in board.systems)


def unit(metric: str, share: bool) -> str:
    """A metric's name with its unit."""
    return f"{metric.upper() if len(metric) < 4 else metric}{' %' if share else ''}"


def number(value: float, share: bool = True, signed: bool = False) -> str:
    """A score as text, in per cent if it is a share."""
    text = f"{100 * value:z.1f}" if share else f"{value:z.3g}"
    if signed and not text.startswith("-"):
        text = f"+{text}"
    return text.replace("-", MINUS)


def interval(estimate: Estimate, share: bool = True) -> str:
    """An estimate with its interval, such as ``92.7 [90.0, 94.7]``."""
    low, high = number(estimate.low, share), number(estimate.high, share)
    return f"{number(estimate.mean, share)} [{low}, {high}]"


def p_value(p: float) -> str:
    """A p-value, such as ``p = 0.012``."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def difference(pair: Pair, share: bool = True) -> str:
    """First minus second system, with interval and p-value, such as ``+7.1 [+4.0, +10.2], p < 0.001``."""
    low, high = number(pair.low, share, signed=True), number(pair.high, share, signed=True)
    return f"{number(pair.difference, share, signed=True)} [{low}, {high}], {p_value(pair.adjusted)}"


def rank(system: System) -> str:
    """The possible ranks of a system, such as ``1`` or ``1-3``; "oracle" for gold passages, "control" for others."""
    if system.rank is None:
        return "oracle" if system.control == "gold" else "control"
    best, worst = system.rank
    return str(best) if best == worst else f"{best}\u2013{worst}"


def recovered(system: System) -> str:
    """The recovered fraction in per cent with its interval, and the number of the RAG system; empty without one."""
    part = system.recovered
    if part is None:
        return ""
    return f"{number(part.fraction)} [{number(part.low)}, {number(part.high)}] of #{part.rag}"


def seconds(cost: Cost) -> str:
    """Time per question, with a star if it is that of the whole command; empty if unknown."""
    if cost.seconds is None:
        return ""
    return f"{_duration(cost.seconds)}*" if cost.whole_command else _duration(cost.seconds)


def _duration(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def first_token(cost: Cost) -> str:
    """Time to the first token; empty if unknown."""
    return "" if cost.first_token is None else _duration(cost.first_token)


def expert_size(cost: Cost) -> str:
    """The size of the experts of a question; empty without experts, or if unknown."""
    if cost.expert_bytes is None:
        return ""
    small = cost.expert_bytes < 2**20
    return f"{cost.expert_bytes / 2**10:.3g} KiB" if small else f"{cost.expert_bytes / 2**20:,.1f} MiB"


def memory(cost: Cost) -> str:
    """Peak memory, with what it was measured on; empty if unknown."""
    return "" if cost.peak_bytes is None else f"{cost.peak_bytes / 2**30:.2f} GiB {cost.memory_of}"


def against(board: Board, place: int, metric: str) -> tuple[str, Pair] | None:
    """The number of the system that a row is compared with, and the comparison.

    Ranked systems are compared with the board's first system, and controls with the system that they belong to.
    """
    control = board.systems[place].control is not None
    family = "controls" if control else "ranked"
    for pair in board.pairs:
        if pair.family == family and pair.metric == metric and pair.second == place and (control or pair.first == 0):
            return f"{board.systems[pair.first].number}", pair.reversed()
    return None


def table(board: Board, max_metrics: int | None = None) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a board, without empty columns.

    Args:
        board: the board.
        max_metrics: maximum number of metrics, from the first on; all by default.
    """
    metrics = board.metrics[:max_metrics]
    share = {metric: is_share(metric, board) for metric in metrics}
    units = {metric: unit(metric, share[metric]) for metric in metrics}
    header = ["#", "rank", "system", "n", *(f"{units[metric]} [95 %]" for metric in metrics)]
    header += [f"\u0394{units[board.metric]} [95 %]", "of #", RECOVERED, "s/question", "first token"]
    header += ["experts/question", "peak memory"]
    several = any(system.seeds for system in board.systems)
    if several:
        header.insert(4, "seeds")
    rows = []
    for place, system in enumerate(board.systems):
        row = [str(system.number), rank(system), system.label, f"{board.n:,}"]
        if several:
            row.append(str(len(system.runs)))
        row += [interval(system.estimates[metric], share[metric]) for metric in metrics]
        compared = against(board, place, board.metric)
        row += [difference(compared[1], share[board.metric]), compared[0]] if compared else ["", ""]
        costs = (seconds(system.cost), first_token(system.cost), expert_size(system.cost), memory(system.cost))
        rows.append([*row, recovered(system), *costs])
    empty = {at for at in range(len(header)) if not any(row[at] for row in rows)}
    keep = [at for at in range(len(header)) if at not in empty]
    return [header[at] for at in keep], [[row[at] for at in keep] for row in rows]


def method(comparison: Comparison, board: Board) -> list[str]:
    """The statistical method, for the foot of every table."""
    ranked = [pair for pair in board.pairs if pair.metric == board.metric]
    families = {name: sum(pair.family == name for pair in ranked) for name in ("ranked", "controls")}
    lines = [
        "Intervals: 95 %; Wilson's for right-or-wrong scores, Wilson's with Kish's effective sample size for other"
        " scores between 0 and 1.",
        f"Differences (\u0394): paired bootstrap over questions, {comparison.draws:,} draws, expanded percentile"
        " interval.",
        "p-values: McNemar's mid-p test for right-or-wrong scores, else the paired bootstrap; after Holm's"
        f" correction ({families['ranked']:,} pairs of ranked systems, {families['controls']:,} with their controls).",
        "Rank: the range of ranks that the significant differences allow (adjusted p < 0.05).",
    ]
    if any(system.recovered for system in board.systems):
        lines.append(
            "Recovered: the gain over closed-book answering, as a share of the gain of the RAG system named, of the"
            " same LLM; paired bootstrap; not given if RAG's gain is not significant (bootstrap p < 0.05, uncorrected)."
        )
    if any(system.control == "gold" for system in board.systems):
        lines.append("Oracle: only passages that are known to contain an answer (passages=gold).")
    if any(system.seeds for system in board.systems):
        lines.append("Several seeds: each question has its mean over seeds; intervals are over questions.")
    if any(system.cost.first_token is not None for system in board.systems):
        lines.append(
            "First token: from the start of a batch, whose experts are made already, to its first new token; mean over"
            " questions."
        )
    if any(system.cost.whole_command for system in board.systems):
        lines.append("* time of the whole command, with loading: the model does not report the time of answering.")
    return lines


def warnings(board: Board) -> list[tuple[str, bool]]:
    """Flags and cautions of a board's systems, as (line, whether it is a flag); equal ones are one line."""
    lines: list[tuple[str, bool]] = []
    for wrong in (True, False):
        texts: dict[str, list[System]] = {}
        for system in board.systems:
            if text := system.flag if wrong else system.caution:
                texts.setdefault(text, []).append(system)
        for text, systems in texts.items():
            first = systems[0]
            names = ", ".join(f"#{system.number}" for system in systems)
            lines.append((f"{names if systems[1:] else f'#{first.number} {first.label}'}: {text}", wrong))
    return lines


def differences(board: Board) -> list[str]:
    """The differences between this board and the first board of its task."""
    return [f"{entry.aspect}: {entry.here}; there: {entry.there}" for entry in board.group.differences]


def allowed(board: Board) -> list[str]:
    """The differences that the user has allowed between systems of one board."""
    return [f"ranked together by --allow: {e.aspect}: {e.here}; others: {e.there}" for e in board.group.allowed]


def title(board: Board, boards: Sequence[Board]) -> str:
    """The task of a board, with the board's number if the task has several."""
    same = [other for other in boards if other.task == board.task]
    return board.task if len(same) == 1 else f"{board.task}, board {same.index(board) + 1} of {len(same)}"
