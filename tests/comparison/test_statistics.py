"""Intervals and tests against scipy and statsmodels, and against the truth in simulations."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar as mcnemar_of_statsmodels
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from genpoe_plugin.comparison.statistics import (
    bootstrap_means,
    holm,
    mcnemar,
    mean_interval,
    paired_bootstrap,
    t_interval,
    wilson_interval,
    wins_and_losses,
)

SIMULATED = 20_000
COVERAGE, FALSE_ALARMS = 0.94, 0.06


@pytest.fixture
def numbers():
    return np.random.default_rng(7)


@pytest.mark.parametrize("n", [1, 2, 9, 480, 11_313])
def test_wilson_equals_statsmodels_and_scipy(n):
    successes = np.unique(np.linspace(0, n, 40).astype(int))
    low, high = wilson_interval(successes / n, n)
    for count, *ours in zip(successes, low, high, strict=True):
        theirs = proportion_confint(count, n, method="wilson")
        scipys = stats.binomtest(int(count), n).proportion_ci(method="wilson")
        assert ours == pytest.approx(theirs, abs=1e-12)
        assert ours == pytest.approx(scipys, abs=1e-12)


def test_t_equals_scipy(numbers):
    scores = numbers.normal(3, 2, size=(37, 5))
    low, high = t_interval(scores)
    for column, *ours in zip(scores.T, low, high, strict=True):
        theirs = stats.t.interval(0.95, len(column) - 1, loc=column.mean(), scale=stats.sem(column))
        assert ours == pytest.approx(theirs, rel=1e-12)


def test_each_column_has_the_interval_of_its_kind(numbers):
    binary = numbers.integers(0, 2, 60).astype(float)
    share = numbers.beta(0.5, 0.5, 60)
    plain = numbers.normal(0, 9, 60)
    nothing, constant = np.zeros(60), np.full(60, 0.25)
    low, high = mean_interval(np.stack([binary, share, plain, nothing, constant], 1))
    assert (low[0], high[0]) == pytest.approx(proportion_confint(binary.sum(), 60, method="wilson"))
    trials = share.mean() * (1 - share.mean()) / stats.sem(share) ** 2
    assert (low[1], high[1]) == pytest.approx(proportion_confint(share.mean() * trials, trials, method="wilson"))
    assert (low[2], high[2]) == pytest.approx(stats.t.interval(0.95, 59, plain.mean(), stats.sem(plain)))
    assert (low[3], high[3]) == pytest.approx(proportion_confint(0, 60, method="wilson"))
    assert (low[4], high[4]) == pytest.approx(proportion_confint(15, 60, method="wilson"))


def test_mcnemar_equals_statsmodels_and_scipy():
    wins, losses = (grid.ravel() for grid in np.meshgrid([0, 1, 2, 5, 14, 300], [0, 1, 3, 14, 47, 299]))
    exact, mid = mcnemar(wins, losses)
    for first, second, ours, halved in zip(wins, losses, exact, mid, strict=True):
        theirs = mcnemar_of_statsmodels([[3, first], [second, 4]], exact=True).pvalue
        assert ours == pytest.approx(min(1.0, theirs), rel=1e-9)
        tosses = stats.binom(first + second, 0.5)
        # The outcome itself counts half on its side: Lancaster's mid-p.
        expected = min(1.0, 2 * tosses.cdf(min(first, second)) - tosses.pmf(min(first, second)))
        assert halved == pytest.approx(expected, rel=1e-9)


def test_holm_equals_statsmodels(numbers):
    for p in (numbers.random(30) ** 4, np.array([0.02, 0.02, 0.01]), np.array([0.3]), np.array([])):
        expected = multipletests(p, method="holm")[1] if len(p) else p
        assert holm(p) == pytest.approx(expected, abs=1e-15)


def test_resamples_are_of_whole_questions_and_the_same_for_all_runs():
    scores = np.stack([np.arange(50.0), 2 * np.arange(50.0) + 1, np.ones(50)], 1)
    means = bootstrap_means(scores, draws=300, seed=3)
    assert means.shape == (300, 3)
    np.testing.assert_allclose(means[:, 1], 2 * means[:, 0] + 1)
    np.testing.assert_allclose(means[:, 2], 1)
    assert len(np.unique(means[:, 0])) > 150
    np.testing.assert_array_equal(means, bootstrap_means(scores, draws=300, seed=3))
    assert (means != bootstrap_means(scores, draws=300, seed=4)).any()


def test_many_blocks_are_one_bootstrap(monkeypatch, numbers):
    scores = numbers.random((40, 2))
    whole = bootstrap_means(scores, draws=2000)
    monkeypatch.setattr("genpoe_plugin.comparison.statistics._BLOCK", 90)
    split = bootstrap_means(scores, draws=2000)
    assert split.shape == whole.shape
    np.testing.assert_allclose(split.mean(0), whole.mean(0), atol=0.01)
    np.testing.assert_allclose(split.std(0), whole.std(0), rtol=0.1)


def test_the_paired_bootstrap_is_scipys(numbers):
    """Another bootstrap of the same differences; both have their own draws, so only so many digits agree."""
    scores = numbers.beta(0.6, 0.4, size=(300, 3))
    scores[:, 1] = np.clip(scores[:, 0] + numbers.normal(0.03, 0.2, 300), 0, 1)
    pairs = np.array([[0, 1], [1, 2], [0, 0]])
    found = paired_bootstrap(scores.mean(0), bootstrap_means(scores), pairs, 300)
    for at, (first, second) in enumerate(pairs[:2]):
        difference = scores[:, first] - scores[:, second]
        theirs = stats.bootstrap((difference,), np.mean, method="percentile", n_resamples=10_000, rng=5)
        assert found.difference[at] == pytest.approx(difference.mean(), abs=1e-12)
        assert found.low[at] == pytest.approx(theirs.confidence_interval.low, abs=2e-3)
        assert found.high[at] == pytest.approx(theirs.confidence_interval.high, abs=2e-3)
        centred = np.abs(theirs.bootstrap_distribution - difference.mean())
        assert found.p[at] == pytest.approx((centred >= abs(difference.mean())).mean(), abs=0.02)
    assert (found.difference[2], found.low[2], found.high[2], found.p[2]) == (0, 0, 0, 1)


def test_p_values_beyond_what_draws_can_count_are_students(numbers):
    """Ten thousand draws count no further than 1e-4, which is nothing among a thousand comparisons."""
    scores = np.stack([numbers.beta(0.6, 0.4, 300), numbers.beta(0.4, 0.6, 300)], 1)
    (p,) = paired_bootstrap(scores.mean(0), bootstrap_means(scores), np.array([[0, 1]]), 300).p
    theirs = stats.ttest_rel(*scores.T).pvalue
    assert theirs < 1e-5
    assert np.log10(p) == pytest.approx(np.log10(theirs), abs=0.3)
    certain = np.stack([np.ones(300), np.zeros(300)], 1)
    (p,) = paired_bootstrap(certain.mean(0), bootstrap_means(certain, draws=100), np.array([[0, 1]]), 300).p
    assert 0 <= p < 1e-6


def test_wins_and_losses_are_counted(numbers):
    scores = numbers.integers(0, 3, size=(50, 3)) / 2
    wins, losses = wins_and_losses(scores, np.array([[0, 1], [2, 0]]))
    assert wins.tolist() == [sum(a > b for a, b, _ in scores), sum(c > a for a, _, c in scores)]
    assert losses.tolist() == [sum(a < b for a, b, _ in scores), sum(c < a for a, _, c in scores)]


# The truth, many times over. Every draw is a run with its own answers to n questions.


def f1_like(numbers, n: int, kind: str) -> tuple[np.ndarray, float]:
    """Scores of many runs, [n, SIMULATED], and the true mean: whole answers, none, and partial ones between."""
    whole, partial, mean = {
        "good": (0.8, 0.15, 0.5),
        "bad": (0.06, 0.06, 0.5),
        "even": (0.4, 0.3, 0.6),
        "smooth": (0.0, 1.0, 0.3),
    }[kind]
    kinds = numbers.random((n, SIMULATED))
    between = numbers.beta(4 * mean, 4 * (1 - mean), size=(n, SIMULATED))
    scores = np.where(kinds < whole, 1.0, np.where(kinds < whole + partial, between, 0.0))
    return scores, whole + partial * mean


@pytest.mark.parametrize(("n", "share"), [(480, 0.0375), (480, 0.5), (100, 0.927), (60, 0.2)])
def test_intervals_of_em_cover_the_truth(numbers, n, share):
    successes = numbers.binomial(n, share, SIMULATED)
    low, high = wilson_interval(successes / n, n)
    assert ((low <= share) & (share <= high)).mean() >= COVERAGE


@pytest.mark.parametrize("kind", ["good", "bad", "even", "smooth"])
def test_intervals_of_f1_cover_the_truth(numbers, kind):
    scores, mean = f1_like(numbers, 100, kind)
    low, high = mean_interval(scores)
    assert ((low <= mean) & (mean <= high)).mean() >= COVERAGE


def test_intervals_of_means_over_seeds_cover_the_truth(numbers):
    """EM of three seeds, alike on a question more often than chance would have it."""
    n, seeds, share = 120, 3, 0.1
    easy = numbers.beta(share * 2, (1 - share) * 2, size=(n, SIMULATED))
    low, high = mean_interval(numbers.binomial(seeds, easy) / seeds)
    assert ((low <= share) & (share <= high)).mean() >= COVERAGE


def test_mcnemar_raises_no_false_alarms(numbers):
    """Two runs that are equally good, and answer differently on one question in five."""
    discordant = numbers.binomial(400, 0.2, SIMULATED)
    wins = numbers.binomial(discordant, 0.5)
    exact, mid = mcnemar(wins, discordant - wins)
    assert (exact < 0.05).mean() <= 0.05
    assert 0.03 <= (mid < 0.05).mean() <= FALSE_ALARMS


@pytest.mark.parametrize("kind", ["good", "even"])
def test_the_paired_bootstrap_raises_no_false_alarms_and_covers_the_truth(numbers, kind):
    """Pairs of runs that are equally good: differences have a mean of 0. One bootstrap serves all, as in a board."""
    scores, _ = f1_like(numbers, 100, kind)
    swapped = numbers.permuted(scores, axis=1)
    difference = scores - swapped
    both = np.concatenate([difference, np.zeros((100, 1))], 1)
    pairs = np.stack([np.arange(SIMULATED), np.full(SIMULATED, SIMULATED)], 1)
    found = paired_bootstrap(both.mean(0), bootstrap_means(both, draws=500), pairs, 100)
    assert 0.03 <= (found.p < 0.05).mean() <= FALSE_ALARMS
    assert ((found.low <= 0) & (found.high >= 0)).mean() >= COVERAGE


def test_many_comparisons_raise_no_more_false_alarms(numbers):
    """Five equally good runs: any of the ten pairs significant, after Holm, is a false alarm of the whole table."""
    tables, n = 2_000, 300
    right = numbers.random((tables, n, 5)) < numbers.beta(2, 2, size=(tables, n, 1))
    first, second = np.triu_indices(5, 1)
    a, b = right[:, :, first], right[:, :, second]
    _, mid = mcnemar((a & ~b).sum(1), (b & ~a).sum(1))
    alarms = [(holm(p) < 0.05).any() for p in mid]
    assert (mid < 0.05).any(1).mean() > 0.15, "without correction"
    assert np.mean(alarms) <= FALSE_ALARMS
