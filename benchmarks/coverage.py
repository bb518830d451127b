"""Coverage of the intervals and false alarms of the paired tests, over synthetic runs with a known true mean."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from benchmarks.row import Row
from genpoe_plugin.comparison.statistics import (
    Floats,
    bootstrap_means,
    holm,
    mcnemar,
    mean_interval,
    paired_bootstrap,
    recovered_fractions,
    wilson_interval,
)

DRAWS = 20_000
SIGNIFICANT = 0.05
EM = ((480, 0.0375), (480, 0.5), (100, 0.927), (60, 0.2))
"""Number of questions, and true share of correct answers."""
F1 = {"good": (0.8, 0.15, 0.5), "bad": (0.06, 0.06, 0.5), "even": (0.4, 0.3, 0.6), "smooth": (0.0, 1.0, 0.3)}
"""Share of answers with F1 1, share of partial answers, and mean F1 of the partial ones."""

FRACTIONS = {"half": (0.3, 0.1, 0.5), "most": (0.45, 0.15, 0.5), "more": (0.6, 0.1, 0.5), "nothing": (0.1, 0.1, 0.4)}
"""True shares of correct answers of a run, of closed-book answering and of RAG."""


def rows(draws: int = DRAWS) -> list[Row]:
    """Lowest coverage of each kind of 95 % interval, and highest false-alarm rate of each test at 0.05.

    Recovered fractions also get a row with their highest coverage.
    """
    rng = np.random.default_rng(7)
    of = f"{draws:,} draws"
    covered = {
        "EM (Wilson)": [em_coverage(rng, n, share, draws) for n, share in EM],
        "F1": [f1_coverage(rng, kind, draws) for kind in F1],
        "EM, mean of 3 seeds": [seeds_coverage(rng, draws)],
    }
    bootstrap = [paired_coverage(rng, kind, draws) for kind in ("good", "even")]
    covered["differences (paired bootstrap)"] = [coverage for coverage, _ in bootstrap]
    covered["recovered fractions"] = [fraction_coverage(rng, kind, max(200, draws // 10)) for kind in FRACTIONS]
    alarms = {
        "McNemar's mid-p": mcnemar_alarms(rng, draws),
        "paired bootstrap": max(alarm for _, alarm in bootstrap),
        "any of ten pairs, Holm": family_alarms(rng, max(50, draws // 10)),
    }
    return [
        *(
            Row(f"coverage of 95 % intervals of {name}, {of}", min(found), "", ">= 0.94")
            for name, found in covered.items()
        ),
        Row(f"highest coverage of recovered fractions, {of}", max(covered["recovered fractions"]), "", "<= 0.96"),
        *(Row(f"false alarms of {name}, {of}", found, "", "<= 0.06") for name, found in alarms.items()),
    ]


def em_coverage(rng: np.random.Generator, n: int, share: float, draws: int) -> float:
    """Coverage of the EM interval over ``n`` questions."""
    low, high = wilson_interval(rng.binomial(n, share, draws) / n, n)
    return float(((low <= share) & (share <= high)).mean())


def f1_scores(rng: np.random.Generator, n: int, kind: str, draws: int) -> tuple[Floats, float]:
    """F1 scores of many runs, [n, draws], and the true mean. A score is 1, 0 or, for partial answers, in between."""
    whole, partial, mean = F1[kind]
    kinds = rng.random((n, draws))
    between = rng.beta(4 * mean, 4 * (1 - mean), size=(n, draws))
    scores = np.where(kinds < whole, 1.0, np.where(kinds < whole + partial, between, 0.0))
    return scores, whole + partial * mean


def f1_coverage(rng: np.random.Generator, kind: str, draws: int, n: int = 100) -> float:
    scores, mean = f1_scores(rng, n, kind, draws)
    return _covering(scores, mean)


def seeds_coverage(rng: np.random.Generator, draws: int) -> float:
    """Coverage of the interval of EM over three seeds, whose scores per question are correlated."""
    n, seeds, share = 120, 3, 0.1
    easy = rng.beta(share * 2, (1 - share) * 2, size=(n, draws))
    return _covering(rng.binomial(seeds, easy) / seeds, share)


def _covering(scores: Floats, mean: float) -> float:
    low, high = mean_interval(scores)
    return float(((low <= mean) & (mean <= high)).mean())


def mcnemar_alarms(rng: np.random.Generator, draws: int) -> float:
    """False alarms for two equally good runs that differ on one question in five."""
    discordant = rng.binomial(400, 0.2, draws)
    wins = rng.binomial(discordant, 0.5)
    return float((mcnemar(wins, discordant - wins)[1] < SIGNIFICANT).mean())


def paired_coverage(rng: np.random.Generator, kind: str, draws: int, n: int = 100) -> tuple[float, float]:
    """Coverage and false alarms for pairs of equally good runs, with one bootstrap per board of 500 pairs."""
    covering, alarms, board = 0, 0, 500
    for seed, start in enumerate(range(0, draws, board)):
        count = min(board, draws - start)
        scores, _ = f1_scores(rng, n, kind, count)
        other, _ = f1_scores(rng, n, kind, count)
        both = np.concatenate([scores, other], 1)
        pairs: NDArray[np.intp] = np.arange(2 * count).reshape(2, count).T
        found = paired_bootstrap(both.mean(0), bootstrap_means(both, draws=4_000, seed=seed), pairs, n)
        covering += np.count_nonzero((found.low <= 0) & (found.high >= 0))
        alarms += np.count_nonzero(found.p < SIGNIFICANT)
    return covering / draws, alarms / draws


def fraction_coverage(rng: np.random.Generator, kind: str, draws: int, n: int = 200) -> float:
    """Coverage of recovered fractions over ``n`` questions; hard questions are hard for all three runs."""
    shares = np.array(FRACTIONS[kind])
    run, floor, ceiling = shares
    true = (run - floor) / (ceiling - floor)
    covering, board = 0, 100
    for seed, start in enumerate(range(0, draws, board)):
        count = min(board, draws - start)
        luck = rng.normal(size=(n, count, 1)) + rng.normal(size=(n, count, 3))
        scores = (luck < np.sqrt(2) * ndtri(shares)).reshape(n, 3 * count).astype(float)
        triples: NDArray[np.intp] = np.arange(3 * count).reshape(count, 3)
        resampled = bootstrap_means(scores, draws=4_000, seed=seed)
        _, low, high = recovered_fractions(scores.mean(0), resampled, triples, n)
        covering += np.count_nonzero((low <= true) & (true <= high))
    return covering / draws


def family_alarms(rng: np.random.Generator, tables: int, n: int = 300, corrected: bool = True) -> float:
    """Share of tables of five equally good runs in which any of the ten pairs is significant."""
    right = rng.random((tables, n, 5)) < rng.beta(2, 2, size=(tables, n, 1))
    first, second = np.triu_indices(5, 1)
    a, b = right[:, :, first], right[:, :, second]
    _, mid = mcnemar((a & ~b).sum(1), (b & ~a).sum(1))
    return float(np.mean([((holm(p) if corrected else p) < SIGNIFICANT).any() for p in mid]))
