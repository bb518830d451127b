"""Break scores down by whether the LLM was given the answer, and by the rank of the passage with the answer."""

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


def known(ranks: NDArray[np.int64] | None) -> bool:
    """Whether any of the ranks is known."""
    return ranks is not None and bool((ranks != UNKNOWN).any())


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
