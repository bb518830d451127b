"""Accuracy by whether the LLM was given the answer, and by where retrieval had it."""

from __future__ import annotations

from collections.abc import Sequence
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


def most_telling(scores: Sequence[Floats], most: int) -> list[int]:
    """The questions on which runs differ most, at most so many, in order of how much they do."""
    spread = np.stack(list(scores)).var(0)
    order = np.argsort(-spread, kind="stable")[:most]
    return [int(place) for place in order if spread[place] > 0]
