"""Intervals and tests against scipy and statsmodels, and against the truth in simulations."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar as mcnemar_of_statsmodels
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from benchmarks import coverage
from genpoe_plugin.comparison.statistics import (
    bootstrap_means,
    expanded_tail,
    holm,
    mcnemar,
    mean_interval,
    paired_bootstrap,
    recovered_fractions,
    t_interval,
    wilson_interval,
    wins_and_losses,
)

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
        level = 1 - 2 * expanded_tail(300)
        theirs = stats.bootstrap(
            (difference,), np.mean, method="percentile", n_resamples=10_000, rng=5, confidence_level=level
        )
        assert found.difference[at] == pytest.approx(difference.mean(), abs=1e-12)
        assert found.low[at] == pytest.approx(theirs.confidence_interval.low, abs=2e-3)
        assert found.high[at] == pytest.approx(theirs.confidence_interval.high, abs=2e-3)
        centred = np.abs(theirs.bootstrap_distribution - difference.mean())
        assert found.p[at] == pytest.approx((centred >= abs(difference.mean())).mean(), abs=0.02)
    assert (found.difference[2], found.low[2], found.high[2], found.p[2]) == (0, 0, 0, 1)


def test_recovered_fractions_are_scipys(numbers):
    """Another bootstrap of the same ratio, with its own draws."""
    luck = numbers.normal(size=(400, 1)) + numbers.normal(size=(400, 3))
    scores = (luck < np.quantile(luck, [0.3, 0.1, 0.5])).astype(float)
    triples = np.array([[0, 1, 2], [2, 1, 0]])
    fractions, lows, highs = recovered_fractions(scores.mean(0), bootstrap_means(scores), triples, 400)

    def ratio(run, floor, ceiling, axis=-1):
        return (run.mean(axis) - floor.mean(axis)) / (ceiling.mean(axis) - floor.mean(axis))

    level = 1 - 2 * expanded_tail(400)
    for triple, fraction, low, high in zip(triples, fractions, lows, highs, strict=True):
        columns = tuple(scores[:, triple].T)
        theirs = stats.bootstrap(
            columns, ratio, paired=True, method="percentile", n_resamples=10_000, rng=5, confidence_level=level
        )
        assert fraction == pytest.approx(ratio(*columns))
        assert (low, high) == pytest.approx(tuple(theirs.confidence_interval), abs=0.05)


def test_recovered_fractions_of_draws_by_hand():
    """Draws without a gain lie beyond all others; lower may be better."""
    gains = [(n / 1000, 0.5) for n in range(1000)]
    resampled = np.array([(run, 0.0, rag) for run, rag in gains])
    for sign in (1, -1):
        (fraction,), (low,), (high,) = recovered_fractions(
            sign * np.array([0.25, 0.0, 0.5]), sign * resampled, np.array([[0, 1, 2]]), 10_000
        )
        ordered = sorted(run / rag for run, rag in gains)
        tail = expanded_tail(10_000)
        assert fraction == 0.5
        assert (low, high) == pytest.approx((ordered[int(999 * tail)], ordered[-int(999 * tail) - 1]))
    resampled[:40, 2] = -0.1
    resampled[0, 0] = resampled[1, 0] = -0.2
    (_,), (low,), (high,) = recovered_fractions(np.array([0.25, 0, 0.5]), resampled, np.array([[0, 1, 2]]), 10_000)
    assert np.isfinite(low) and high == np.inf


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


@pytest.mark.parametrize("n", [5, 30, 1000])
def test_expanded_tails_are_as_far_out_as_students(n):
    """A normal distribution of draws, whose variance is too small by (n - 1) / n, then gives Student's interval."""
    z = -stats.norm.ppf(expanded_tail(n)) * np.sqrt((n - 1) / n)
    assert z == pytest.approx(stats.t.ppf(0.975, n - 1))


def test_wins_and_losses_are_counted(numbers):
    scores = numbers.integers(0, 3, size=(50, 3)) / 2
    wins, losses = wins_and_losses(scores, np.array([[0, 1], [2, 0]]))
    assert wins.tolist() == [sum(a > b for a, b, _ in scores), sum(c > a for a, _, c in scores)]
    assert losses.tolist() == [sum(a < b for a, b, _ in scores), sum(c < a for a, _, c in scores)]


# The truth, many times over. `python -m benchmarks compare` prints the same for all kinds.


@pytest.mark.parametrize(("n", "share"), coverage.EM)
def test_intervals_of_em_cover_the_truth(numbers, n, share):
    assert coverage.em_coverage(numbers, n, share, coverage.DRAWS) >= COVERAGE


@pytest.mark.parametrize("kind", coverage.F1)
def test_intervals_of_f1_cover_the_truth(numbers, kind):
    assert coverage.f1_coverage(numbers, kind, 5_000) >= COVERAGE


def test_intervals_of_means_over_seeds_cover_the_truth(numbers):
    assert coverage.seeds_coverage(numbers, 5_000) >= COVERAGE


def test_mcnemar_raises_no_false_alarms(numbers):
    assert 0.03 <= coverage.mcnemar_alarms(numbers, coverage.DRAWS) <= FALSE_ALARMS


@pytest.mark.parametrize("kind", ["good", "even"])
def test_the_paired_bootstrap_raises_no_false_alarms_and_covers_the_truth(numbers, kind):
    covering, alarms = coverage.paired_coverage(numbers, kind, 5_000)
    assert covering >= COVERAGE
    assert 0.03 <= alarms <= FALSE_ALARMS


@pytest.mark.parametrize("kind", coverage.FRACTIONS)
def test_intervals_of_recovered_fractions_cover_the_truth(numbers, kind):
    assert COVERAGE <= coverage.fraction_coverage(numbers, kind, 2_000) <= 0.97


def test_many_comparisons_raise_no_more_false_alarms(numbers):
    assert coverage.family_alarms(numbers, 1_000, corrected=False) > 0.15
    assert coverage.family_alarms(numbers, 1_000) <= FALSE_ALARMS


def test_the_benchmark_has_a_row_for_every_kind():
    rows = coverage.rows(draws=400)
    assert [row.target for row in rows] == [">= 0.94"] * 5 + ["<= 0.96"] + ["<= 0.06"] * 3
    assert all(0.85 <= row.value <= 1 for row in rows[:6]) and all(0 <= row.value <= 0.12 for row in rows[6:])
