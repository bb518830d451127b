"""Break scores down by what a question is like: its passages, and whether the LLM can answer it without any."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from genpoe_plugin.comparison.runs import ABSENT, UNKNOWN
from genpoe_plugin.comparison.statistics import Floats, mean_interval

RANKS = (1, 2, 3, 5, 10, 20)
"""The last rank of each group of ranks; higher ranks form one more group."""


@dataclass(frozen=True)
class Estimate:
    """A mean over questions with its 95 % interval.

    Attributes:
        mean: the mean.
        low, high: ends of the interval.
        n: number of questions.
    """

    mean: float
    low: float
    high: float
    n: int


def estimate(scores: Floats) -> Estimate:
    """The mean of the scores of at least one question, with its interval."""
    low, high = mean_interval(scores[:, None])
    return Estimate(float(scores.mean()), float(low[0]), float(high[0]), len(scores))


def _estimates(groups: Mapping[str, Floats]) -> dict[str, Estimate]:
    """The estimate of every group that has questions."""
    return {name: estimate(scores) for name, scores in groups.items() if len(scores)}


def by_given(scores: Floats, answer_given: NDArray[np.int64]) -> dict[str, Estimate]:
    """Scores of questions with an answer in the LLM's passages (``present``) and without (``absent``)."""
    return _estimates({"present": scores[answer_given == 1], "absent": scores[answer_given == 0]})


def by_rank(scores: Floats, ranks: NDArray[np.int64]) -> dict[str, Estimate]:
    """Scores by the best rank of a retrieved passage with an answer; the last group has no such passage."""
    groups: dict[str, Floats] = {}
    first = 1
    for last in RANKS:
        name = str(last) if first == last else f"{first}\u2013{last}"
        groups[name] = scores[(ranks >= first) & (ranks <= last)]
        first = last + 1
    groups[f"{first}+"] = scores[ranks >= first]
    groups["not found"] = scores[ranks == ABSENT]
    return _estimates(groups)


def by_known(scores: Floats, closed_book: Floats) -> dict[str, Estimate]:
    """Scores of questions that closed-book answering gets right (``known``) and of the others (``unknown``).

    Empty unless each closed-book score is 0 or 1.
    """
    if not ((closed_book == 0) | (closed_book == 1)).all():
        return {}
    return _estimates({"known": scores[closed_book == 1], "unknown": scores[closed_book == 0]})


def by_length(scores: Floats, lengths: NDArray[np.int64]) -> dict[str, Estimate]:
    """Scores by the length of the best passage in words, in three groups of about as many questions."""
    measured = lengths[lengths != UNKNOWN]
    if not len(measured):
        return {}
    last = np.unique(np.quantile(measured, [1 / 3, 2 / 3, 1], method="inverted_cdf")).tolist()
    groups: dict[str, Floats] = {}
    first = int(measured.min())
    for end in last:
        name = f"{first}\u2013{end}" if first < end else f"{end}"
        groups[name] = scores[(lengths >= first) & (lengths <= end)]
        first = end + 1
    return _estimates(groups)


def known(values: NDArray[np.int64]) -> bool:
    """Whether any of the ranks or lengths is known."""
    return bool((values != UNKNOWN).any())


def differing_questions(scores: Sequence[Floats], pairs: Iterable[tuple[int, int]], most: int) -> list[int]:
    """Questions on which systems differ: the first of every pair of systems, then the second of every pair, and so on.

    Args:
        scores: scores of every system.
        pairs: pairs of systems, as positions in ``scores``.
        most: largest number of questions.
    """
    won = [np.flatnonzero(sign * (scores[a] - scores[b]) > 0) for a, b in pairs for sign in (1, -1)]
    selected: dict[int, None] = {}
    for turn in range(max(map(len, won), default=0)):
        for questions in won:
            if turn < len(questions) and len(selected) < most:
                selected[int(questions[turn])] = None
        if len(selected) >= most:
            break
    return sorted(selected)
