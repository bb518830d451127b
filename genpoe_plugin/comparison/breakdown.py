"""Accuracy by whether the LLM was given the answer, and by where retrieval had it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from genpoe_plugin.comparison.runs import ABSENT, UNKNOWN
from genpoe_plugin.comparison.statistics import Floats, mean_interval

RANKS = (1, 2, 3, 5, 10, 20)
"""The last rank of each group of ranks; all beyond are one more group."""


@dataclass(frozen=True)
class Estimate:
    """A mean over ``n`` questions with its 95 % interval."""

    mean: float
    low: float
    high: float
    n: int


def estimate(scores: Floats) -> Estimate | None:
    """Of the mean of the scores of some questions; None if there are none."""
    if not len(scores):
        return None
    low, high = mean_interval(scores[:, None])
    return Estimate(float(scores.mean()), float(low[0]), float(high[0]), len(scores))


def by_given(scores: Floats, given: NDArray[np.int64]) -> dict[str, Estimate]:
    """By whether a passage that the LLM was given has an answer: ``present`` and ``absent``, where there are any."""
    parts = {"present": estimate(scores[given == 1]), "absent": estimate(scores[given == 0])}
    return {name: part for name, part in parts.items() if part is not None}


def by_rank(scores: Floats, ranks: NDArray[np.int64]) -> dict[str, Estimate]:
    """By the best rank of a retrieved passage with an answer; the last group is where retrieval found none."""
    parts: dict[str, Estimate | None] = {}
    first = 1
    for last in RANKS:
        name = str(last) if first == last else f"{first}\u2013{last}"
        parts[name] = estimate(scores[(ranks >= first) & (ranks <= last)])
        first = last + 1
    parts[f"{first}+"] = estimate(scores[ranks >= first])
    parts["not found"] = estimate(scores[ranks == ABSENT])
    return {name: part for name, part in parts.items() if part is not None}


def known(ranks: NDArray[np.int64] | None) -> bool:
    """Whether there is anything to break down by."""
    return ranks is not None and bool((ranks != UNKNOWN).any())


def telling(scores: Sequence[Floats], pairs: Iterable[tuple[int, int]], most: int) -> list[int]:
    """Questions that one of two systems does better: of every pair the first, then the second, and so on.

    Args:
        scores: of every system.
        pairs: of systems, by place in ``scores``.
        most: how many in all.
    """
    won = [np.flatnonzero(sign * (scores[a] - scores[b]) > 0) for a, b in pairs for sign in (1, -1)]
    found: dict[int, None] = {}
    for turn in range(max(map(len, won), default=0)):
        for questions in won:
            if turn < len(questions) and len(found) < most:
                found[int(questions[turn])] = None
        if len(found) >= most:
            break
    return sorted(found)
