"""Intervals and paired tests over questions, for many runs at once.

All functions work on a matrix of scores, ``[questions, runs]``. A row is one question, so runs are always compared on
the same questions. Levels are two-sided.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import bdtr, ndtr, ndtri, stdtr, stdtrit

Floats = NDArray[np.float64]

LEVEL = 0.95
DRAWS = 10_000
MIN_COUNT = 10
_BLOCK = 1 << 19  # resampled questions per block: few enough for a processor's cache
TIE = 1e-12  # differences below this are due to rounding


def wilson_interval(share: ArrayLike, n: ArrayLike, level: float = LEVEL) -> tuple[Floats, Floats]:
    """Wilson's score interval for a share of ``n`` trials; ``n`` may be fractional."""
    share, n = np.asarray(share, float), np.asarray(n, float)
    z2 = ndtri((1 + level) / 2) ** 2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = np.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    # At 0 and 1, the interval ends at the share itself; rounding must not change that.
    return np.clip(centre - half, 0, share), np.clip(centre + half, share, 1)


def t_interval(scores: Floats, level: float = LEVEL) -> tuple[Floats, Floats]:
    """Student's interval for the mean of each column of ``scores``, ``[questions, runs]``."""
    n = len(scores)
    mean = scores.mean(0)
    if n < 2:
        return np.full_like(mean, -np.inf), np.full_like(mean, np.inf)
    half = stdtrit(n - 1, (1 + level) / 2) * scores.std(0, ddof=1) / np.sqrt(n)
    return mean - half, mean + half


def mean_interval(scores: Floats, level: float = LEVEL) -> tuple[Floats, Floats]:
    """The interval for the mean of each column of ``scores``, ``[questions, runs]``.

    Wilson's interval for columns of zeros and ones. Also Wilson's for other values between 0 and 1, such as F1 or means
    over seeds, with Kish's effective sample size: Student's interval covers too little if most scores are 0 or 1.
    Student's interval for all other values.
    """
    n = len(scores)
    low, high = t_interval(scores, level)
    share = scores.mean(0)
    bounded = ((scores >= 0) & (scores <= 1)).all(0)
    variance = scores.var(0, ddof=1) if n > 1 else np.zeros_like(share)
    certain = ((scores == 0) | (scores == 1)).all(0) | (variance == 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        trials = np.where(certain, n, n * share * (1 - share) / variance)
    wilson_low, wilson_high = wilson_interval(share[bounded], trials[bounded], level)
    low[bounded], high[bounded] = wilson_low, wilson_high
    return low, high


def _resampled_counts(n: int, draws: int, generator: np.random.Generator) -> Iterator[Floats]:
    """Yield how often each of ``n`` questions is in each bootstrap sample, in blocks ``[samples, n]``."""
    block = max(1, min(draws, _BLOCK // n))
    for start in range(0, draws, block):
        rows = min(block, draws - start)
        drawn = generator.integers(0, n, size=(rows, n), dtype=np.int64)
        drawn += n * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)


def bootstrap_means(scores: Floats, draws: int = DRAWS, seed: int = 0) -> Floats:
    """Means over resampled questions, ``[draws, runs]``; a draw has the same questions for all runs."""
    generator = np.random.default_rng(seed)
    blocks = _resampled_counts(len(scores), draws, generator)
    return np.concatenate([counts @ scores for counts in blocks]) / len(scores)


def expanded_tail(n: int, level: float = LEVEL) -> float:
    """The share of draws outside each end of a percentile interval for the mean of ``n`` questions.

    Bootstrap draws of few questions vary too little. Hesterberg's (2015) expanded percentiles make the interval as wide
    as Student's.
    """
    degrees = max(1, n - 1)
    return float(ndtr(np.sqrt(n / degrees) * stdtrit(degrees, (1 - level) / 2)))


@dataclass(frozen=True)
class PairedBootstrap:
    """The paired bootstrap of several pairs of runs, each array ``[pairs]``.

    Attributes:
        difference: mean difference.
        low, high: ends of its expanded percentile interval.
        p: p-value of no difference.
    """

    difference: Floats
    low: Floats
    high: Floats
    p: Floats


def paired_bootstrap(
    means: Floats, resampled: Floats, pairs: NDArray[np.intp], n: int, level: float = LEVEL
) -> PairedBootstrap:
    """Compare pairs of runs on resampled questions.

    The p-value is the share of draws whose difference deviates from the observed difference by at least the observed
    difference itself. If fewer than `MIN_COUNT` draws do, it is Student's p-value with the draws' standard error,
    because a count cannot be small enough to be significant among a thousand comparisons.

    Args:
        means: means over questions, ``[runs]``.
        resampled: result of `bootstrap_means`, ``[draws, runs]``.
        pairs: pairs of columns of ``means``, ``[pairs, 2]``.
        n: number of questions.
        level: level of the interval.
    """
    difference = means[pairs[:, 0]] - means[pairs[:, 1]]
    low, high, p = (np.empty_like(difference) for _ in range(3))
    tail = expanded_tail(n, level)
    wider = np.sqrt(n / max(1, n - 1))  # corrects the draws' variation, which is too small by this factor
    columns = np.ascontiguousarray(resampled.T)
    draws = len(resampled)
    block = max(1, _BLOCK // draws)
    for start in range(0, len(pairs), block):
        part = slice(start, start + block)
        drawn = columns[pairs[part, 0]] - columns[pairs[part, 1]]
        observed = difference[part, None]
        further = np.count_nonzero(wider * np.abs(drawn - observed) >= np.abs(observed) - TIE, axis=1)
        counted = (1 + further) / (1 + draws)
        with np.errstate(divide="ignore", invalid="ignore"):
            beyond = 2 * stdtr(max(1, n - 1), -np.abs(difference[part]) / (wider * drawn.std(1)))
        p[part] = np.where(further < MIN_COUNT, np.fmin(counted, beyond), counted)
        low[part], high[part] = np.quantile(drawn, [tail, 1 - tail], axis=1, overwrite_input=True)
    return PairedBootstrap(difference, low, high, p)


def recovered_fractions(
    means: Floats, resampled: Floats, triples: NDArray[np.intp], n: int, level: float = LEVEL
) -> tuple[Floats, Floats, Floats]:
    """The share of the gain from a floor to a ceiling that a run reaches, with its expanded percentile interval.

    The fraction is (run - floor) / (ceiling - floor). It is meaningful only if the gain of the ceiling is significant.
    An end is infinite if too many draws have no gain.

    Args:
        means: means over questions, ``[runs]``.
        resampled: result of `bootstrap_means`, ``[draws, runs]``.
        triples: columns of run, floor and ceiling, ``[triples, 3]``; the means of floor and ceiling differ.
        n: number of questions.
        level: level of the interval.

    Returns:
        The fractions and the ends of their intervals, each ``[triples]``.
    """
    run, floor, ceiling = triples.T
    gain = means[ceiling] - means[floor]
    fraction = (means[run] - means[floor]) / gain
    low, high = np.empty_like(fraction), np.empty_like(fraction)
    tail = expanded_tail(n, level)
    for at in range(len(triples)):
        sign = np.sign(gain[at])
        reached = sign * (resampled[:, run[at]] - resampled[:, floor[at]])
        possible = sign * (resampled[:, ceiling[at]] - resampled[:, floor[at]])
        # Without a gain in a draw, no fraction is large enough to reach what the run gained, or small enough.
        drawn = np.where(reached > 0, np.inf, -np.inf)
        np.divide(reached, possible, out=drawn, where=possible > TIE)
        low[at] = np.quantile(drawn, tail, method="lower")
        high[at] = np.quantile(drawn, 1 - tail, method="higher")
    return fraction, low, high


def wins_and_losses(scores: Floats, pairs: NDArray[np.intp]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The number of questions on which the first run of each pair scores higher, and the second."""
    wins, losses = (np.empty(len(pairs), np.int64) for _ in range(2))
    columns = np.ascontiguousarray(scores.T)
    for at, (first, second) in enumerate(pairs):
        difference = columns[first] - columns[second]
        wins[at] = np.count_nonzero(difference > TIE)
        losses[at] = np.count_nonzero(difference < -TIE)
    return wins, losses


def mcnemar(wins: ArrayLike, losses: ArrayLike) -> tuple[Floats, Floats]:
    """McNemar's test on the questions that only one of two runs answers correctly: exact and mid-p p-values."""
    wins, losses = np.asarray(wins), np.asarray(losses)
    fewer, total = np.minimum(wins, losses), wins + losses
    below = np.where(fewer > 0, bdtr(np.maximum(fewer - 1, 0), np.maximum(total, 1), 0.5), 0.0)
    tail = np.where(total > 0, bdtr(fewer, np.maximum(total, 1), 0.5), 1.0)
    return np.minimum(1.0, 2 * tail), np.minimum(1.0, tail + below)


def holm(p: ArrayLike) -> Floats:
    """Holm's adjustment of p-values for multiple comparisons (controls the family-wise error rate)."""
    p = np.asarray(p, float)
    order = np.argsort(p, kind="stable")
    steps = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, steps)
    return adjusted
